"""Published sizes against timm and transformers, with the same weights; the quick ones always, the others as slow."""

import pytest
from reference_table import ROWS, compare

QUICK = ("pvt_b0",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]
)
def test_outputs_and_parameters_of_published_sizes_equal_the_references(name):
    for row in compare(name):
        assert row.difference <= 1e-5 * row.scale, row
        assert row.parameters == row.their_parameters, row
