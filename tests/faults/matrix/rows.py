"""All rows, in the table's order."""

from __future__ import annotations

from faults.matrix import rows_processes
from faults.matrix.row import Row

ROWS: list[Row] = [*rows_processes.ROWS]
