"""The fault matrix, one test a row: what matrix/rows_*.py promise, seen of real processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from faults.matrix.player import play
from faults.matrix.references import References
from faults.matrix.row import Measured, Row
from faults.matrix.rows import PLAYED
from faults.matrix.runs import Run


def parameters() -> list[object]:
    """Each row under its fault's name."""
    listed = []
    for row in PLAYED:
        marks = [] if row.fast else [pytest.mark.slow]
        listed.append(pytest.param(row, id=row.fault, marks=marks))
    return listed


@pytest.mark.parametrize("row", parameters())
def test_the_run_survives_or_ends_as_the_table_says(
    row: Row,
    references: References,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
) -> None:
    run = new_run(world_size=row.world_size, zero_stage=row.zero_stage)
    took = play(row, run, references)
    measured(took)
    for entry in row.shows_too:
        measured(entry.measured(ended=took.ended_seconds, recovered=took.recovered_seconds))
