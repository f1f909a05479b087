"""Which samples were replaced by others, RUN/ledger/attempt-A-rank-R.jsonl, and how many may be. Called by train.py.

A sample whose bytes match the index and do not decode is replaced by rule (`Stream.substitutes`). Each is a
line here, written when its step is done; a run that goes on from an older checkpoint replaces the same
positions by the same samples, and says so again under its new attempt. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.errors import DataError

LEDGER_FOLDER = "ledger"
FREE_SAMPLES = 1000  # until so many are consumed, one bad sample is too large a fraction to mean anything


class Replacement(NamedTuple):
    """A sample that stands where another should, at position g of the run."""

    g: int
    dataset: str  # URL
    shard: str
    key: str
    offset: int  # of the image that does not decode, bytes from the shard's start
    error: str
    substitute_shard: str
    substitute_key: str


class Ledger:
    """One rank's file of one attempt, made at the first replacement. Lines are written whole, in one go."""

    def __init__(self, run_dir: Path, *, attempt: int, rank: int) -> None:
        self.path = Path(run_dir) / LEDGER_FOLDER / f"attempt-{attempt}-rank-{rank}.jsonl"
        self._file = -1

    def write(self, replacements: Sequence[Replacement], *, step: int) -> None:
        """Raises DataError when the file cannot be written: what was replaced must be known."""
        if not replacements:
            return
        lines = "".join(json.dumps({**found._asdict(), "step": step}) + "\n" for found in replacements)
        try:
            if self._file < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._file = os.open(self.path, flags, 0o644)
            data = memoryview(lines.encode("utf-8", "surrogateescape"))
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise DataError(
                f"{self.path}: samples were replaced, and this cannot be written down: {error}; free space, "
                "then start the run again"
            ) from None

    def sync(self) -> None:
        """Wait until all lines are on disk, as a checkpoint that counts them does."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The run's replacements by position, ascending, each once: of several attempts' the newest counts.

    Raises DataError for a line that is damaged, other than a last one that a kill cut off.
    """
    found: dict[int, tuple[int, dict[str, Any]]] = {}
    for path in sorted((Path(run_dir) / LEDGER_FOLDER).glob("attempt-*-rank-*.jsonl")):
        attempt = int(path.name.split("-")[1])
        for record in _records(path):
            g = int(record["g"])
            if g not in found or attempt >= found[g][0]:
                found[g] = attempt, record
    return [record for _, (_, record) in sorted(found.items())]


def _records(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # nothing, or what no line end follows: torn
            return
        try:
            record = json.loads(line)
            int(record["g"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}: line {number} is damaged ({line[:40]!r}…); remove that line to read the rest"
            ) from None
        yield record


def check_budget(replaced: int, samples: int, *, max_fraction: float, run_dir: Path) -> None:
    """Raises DataError when more of the run's `samples` were replaced than it allows. Ranks must give the
    sums over all of them, so that they stop together.
    """
    if samples >= FREE_SAMPLES and replaced > max_fraction * samples:
        raise DataError(
            f"{replaced} of {samples} samples did not decode and were replaced, which is more than "
            f"data.max_replaced_fraction={max_fraction:g}; {Path(run_dir) / LEDGER_FOLDER} names them: mend or "
            "exclude them, or allow more"
        )
