"""The table of the fault matrix says what was measured."""

from __future__ import annotations

from faults.matrix import measured, table
from faults.matrix.rows import ROWS


def test_the_page_is_what_the_generator_makes_of_the_measurements() -> None:
    assert table.README.read_text(encoding="utf-8") == table.text(), "run `python -m faults.matrix --table`"


def test_every_row_is_measured_as_it_is_now_and_nothing_else_is() -> None:
    known = measured.read(measured.ROWS)
    assert set(known) == {row.fault for row in ROWS}
    changed = [row.fault for row in ROWS if not measured.holds(known[row.fault], row)]
    assert not changed, "run `python -m faults.matrix --missing`"


def test_every_row_says_what_counts_it() -> None:
    assert [row.fault for row in ROWS if row.counted is None] == []


def test_no_two_rows_have_one_name() -> None:
    names = [row.fault for row in ROWS]
    assert len(names) == len(set(names))
