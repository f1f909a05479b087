"""What was measured, kept in measured.json between partial runs. Written by tests, soak.py and
plain_deepspeed.py, read by table.py."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faults.matrix.row import Measured

FILE = Path(__file__).resolve().parent / "measured.json"
VARIABLE = "MATRIX_MEASURE"  # set by __main__.py: only then does a test's run change the file
ROWS, DEEPSPEED, SOAK = "rows", "plain deepspeed", "soak"


def read(section: str) -> dict[str, Any]:
    """By name; none yet where nothing was measured."""
    everything = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return everything.get(section, {})


def write(section: str, entries: Mapping[str, Any]) -> None:
    everything = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    everything[section] = dict(entries)
    text = json.dumps(everything, indent=1, sort_keys=True, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")


def keep(row: Measured) -> None:
    """A row is measured by itself: others stay as they were."""
    if os.environ.get(VARIABLE) == "1":
        write(ROWS, {**read(ROWS), row.fault: dict(row.as_json)})
