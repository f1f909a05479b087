"""The saves that a run trusts no more, RUN/distrusted.json: those of an attempt and all before it, up to its N-th, that
have consumed more than `beyond` positions.

Written by rank 0 when ranks were found to hold different weights, or numbers were not finite (rollback.py), before
anything else is done about it, and for good. Whoever lists a run's checkpoints leaves them out (courses.py), and no
writer lists one any more: wherever the run is killed, nobody goes on from them. What the run saves later on the same
steps has a later number, and counts. Imports no torch and no numpy: writers read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.run_lists import read_list, write_list

DISTRUSTED_NAME = "distrusted.json"


@dataclass(frozen=True, kw_only=True)
class Distrusted:
    """Saves up to the `saves`-th of `attempt`, earlier attempts' with them, beyond the position `beyond`."""

    beyond: int
    attempt: int
    saves: int
    reason: str
    time: float

    def has(self, manifest: Manifest) -> bool:
        return manifest.samples > self.beyond and _number_of(manifest) <= (self.attempt, self.saves)

    def covers(self, other: Distrusted) -> bool:
        later = (self.attempt, self.saves) >= (other.attempt, other.saves)
        return later and self.beyond <= other.beyond


def read_distrusted(run_dir: Path) -> tuple[Distrusted, ...]:
    """None for a run that trusts all of its saves. Raises CheckpointError when damaged."""

    def parse(records: list[dict[str, Any]]) -> tuple[Distrusted, ...]:
        found = tuple(Distrusted(**record) for record in records)
        if not all(isinstance(n, int) for one in found for n in (one.beyond, one.attempt, one.saves)):
            raise ValueError("beyond, attempt and saves are whole numbers")
        return found

    return read_list(
        Path(run_dir) / DISTRUSTED_NAME,
        "courses",
        parse,
        if_damaged="it says which checkpoints may hold wrong weights: bring it back from a copy; without one remove "
        "it, and all checkpoints newer than the last `rollback` in journal.jsonl leads to",
    )


def write_distrusted(run_dir: Path, distrusted: Sequence[Distrusted]) -> None:
    """Whole or not at all. Raises PretrainError."""
    write_list(Path(run_dir) / DISTRUSTED_NAME, "courses", map(asdict, distrusted))


def distrusting(distrusted: Sequence[Distrusted], more: Iterable[Distrusted]) -> tuple[Distrusted, ...]:
    """`distrusted` with `more`, oldest first, without those that another one covers."""
    every = sorted({*distrusted, *more}, key=lambda one: (one.attempt, one.saves, -one.beyond, one.time))
    return tuple(one for i, one in enumerate(every) if not any(later.covers(one) for later in every[i + 1 :]))


def _number_of(manifest: Manifest) -> tuple[int, int]:
    """Its save's place in the run's; of one that an older version saved, no save is before it in its attempt."""
    attempt, _, number = manifest.save_id.partition("-")
    return (int(attempt), int(number)) if attempt and number else (manifest.attempt, 0)
