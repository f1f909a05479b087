"""All rows, in the table's order."""

from __future__ import annotations

from faults.matrix import rows_checkpoints, rows_data, rows_numbers, rows_processes
from faults.matrix.row import Entry, Row

ROWS: list[Entry] = [*rows_processes.ROWS, *rows_checkpoints.ROWS, *rows_data.ROWS, *rows_numbers.ROWS]
PLAYED = [row for row in ROWS if isinstance(row, Row)]
