"""What was measured, kept in measured.json between partial runs. Written by tests, soak.py and
plain_deepspeed.py, read by table.py."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from faults.matrix.row import Entry, Measured

FILE = Path(__file__).resolve().parent / "measured.json"
# Only with "1" does a test's run change the file; with "missing" for what is not in it, or has changed since.
VARIABLE = "MATRIX_MEASURE"
BESIDE = "MATRIX_BESIDE"  # "1": the machine has other work as well, and the table says so
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
    wanted = os.environ.get(VARIABLE)
    known = read(ROWS)
    if wanted == "1" or (wanted == "missing" and not holds(known.get(row.fault), row)):
        write(ROWS, {**known, row.fault: {**row.as_json, **beside()}})


def beside() -> dict[str, bool]:
    """What an entry has besides, where the machine has other work as well."""
    return {"beside_other_work": True} if os.environ.get(BESIDE) == "1" else {}


def holds(entry: Mapping[str, Any] | None, row: Entry | Measured) -> bool:
    """Is that what was measured of this row as it is now?"""
    said = ("outcome", "code", "bound_seconds")
    return entry is not None and all(entry[name] == getattr(row, name) for name in said)
