"""Measurements of rows, kept in measured.json between partial runs. Written by tests, read by table.py."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from faults.matrix.row import Measured

FILE = Path(__file__).resolve().parent / "measured.json"
VARIABLE = "MATRIX_MEASURE"  # set by __main__.py: only then does a test's run change the file


def read() -> dict[str, Mapping[str, object]]:
    """By the fault's name; none yet where the file is missing."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def keep(row: Measured) -> None:
    """A row is measured by itself: others stay as they were."""
    if os.environ.get(VARIABLE) != "1":
        return
    rows = {**read(), row.fault: row.as_json}
    FILE.write_text(json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
