"""How much memory an export takes."""

from pathlib import Path

import pytest
from export_memory import build, measure, spec_of


@pytest.mark.slow
def test_an_export_of_eight_ranks_of_zero_3_holds_one_copy_of_the_weights(tmp_path: Path) -> None:
    """What Python and torch take anyway is measured with a model of 20 MB."""
    build(tmp_path / "small", spec_of("tiny"))
    without = measure(tmp_path / "small", tmp_path / "small_out", format="timm")
    weights = build(tmp_path / "run", spec_of("large"))
    found = measure(tmp_path / "run", tmp_path / "out", format="timm")
    assert found["verified"]
    assert found["anonymous"] - without["anonymous"] <= 1.3 * weights
