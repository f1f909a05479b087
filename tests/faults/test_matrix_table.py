"""The table of the fault matrix says what was measured."""

from __future__ import annotations

from faults.matrix import measured, table
from faults.matrix.rows import ROWS


def test_the_page_is_what_the_generator_makes_of_the_measurements() -> None:
    assert table.README.read_text(encoding="utf-8") == table.text(), "run `python -m faults.matrix --table`"


def test_what_is_measured_is_a_row() -> None:
    assert set(measured.read(measured.ROWS)) <= {row.fault for row in ROWS}


def test_no_two_rows_have_one_name() -> None:
    names = [row.fault for row in ROWS]
    assert len(names) == len(set(names))
