"""The positions that a run jumps over, RUN/skipped.json: [start, stop) each, why, and by which attempt.

Written by rank 0 when numbers went wrong (train.py), before anybody goes back, and for good; read wherever a run
opens its data. Every checkpoint's manifest repeats the list as it was known then. A checkpoint that has consumed
what is now skipped is of a course that was given up: `is_given_up`, and nobody goes on from it. So a crash between
the list and what follows from it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.run_lists import read_list, write_list

SKIPPED_NAME = "skipped.json"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """The positions [start, stop) of a run, which it does not consume."""

    start: int
    stop: int
    reason: str
    attempt: int
    time: float

    def described(self) -> dict[str, Any]:
        """As manifests repeat it."""
        return {"start": self.start, "stop": self.stop, "reason": self.reason, "attempt": self.attempt}


def read_skipped(run_dir: Path) -> tuple[Skipped, ...]:
    """By position; none for a run that never skipped any. Raises CheckpointError when damaged."""

    def parse(records: list[dict[str, Any]]) -> tuple[Skipped, ...]:
        found = sorted((Skipped(**record) for record in records), key=lambda one: one.start)
        if not all(isinstance(edge, int) and edge >= 0 for one in found for edge in (one.start, one.stop)):
            raise ValueError("an interval's edges are not positions")
        from pretrain.data.skips import Skips  # numpy, which writers do without while nothing is skipped

        Skips((one.start, one.stop) for one in found)
        return tuple(found)

    return read_list(
        Path(run_dir) / SKIPPED_NAME,
        "intervals",
        parse,
        if_damaged="bring it back from a copy, the newest checkpoint's manifest.json lists under `skipped` what it "
        "must say",
    )


def write_skipped(run_dir: Path, skipped: Sequence[Skipped]) -> None:
    """Whole or not at all. Raises PretrainError."""
    write_list(Path(run_dir) / SKIPPED_NAME, "intervals", map(asdict, skipped))


def adding(skipped: Sequence[Skipped], one: Skipped) -> tuple[Skipped, ...]:
    """`skipped` with `one`, or with what of it was not skipped already, by position."""
    pieces = []
    start = one.start
    for known in sorted(skipped, key=lambda known: known.start):
        if known.stop > start and known.start < one.stop:
            if known.start > start:
                pieces.append(replace(one, start=start, stop=known.start))
            start = known.stop
    if start < one.stop:
        pieces.append(replace(one, start=start))
    return tuple(sorted([*skipped, *pieces], key=lambda known: known.start))


def edges(skipped: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(start, stop) of a manifest's intervals."""
    return [(int(one["start"]), int(one["stop"])) for one in skipped]


def is_given_up(manifest: Manifest, skipped: Sequence[tuple[int, int]]) -> bool:
    """Has that checkpoint consumed positions that are `skipped` now?"""
    known = edges(manifest.skipped)
    return any(start < manifest.samples and (start, stop) not in known for start, stop in skipped)
