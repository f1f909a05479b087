"""Which step of a run consumed which positions, as its journal tells. Called by `pretrain order --audit` and replay."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.data.skips import Skips
from pretrain.datasets import ExistingRun
from pretrain.metrics.journal import JOURNAL_NAME, read_journal


@dataclass(frozen=True, kw_only=True)
class History:
    """How far a run has come. Steps that were done again after a resume or a rollback count once, as they were last.

    reached: the position up to which the run has come, as its journal says. committed: up to the newest
    checkpoint. pieces: (samples, step, global batch) from where on steps were of that batch, ascending.
    """

    reached: int
    committed: int
    pieces: tuple[tuple[int, int, int], ...]
    skips: Skips

    def step_of(self, position: int) -> int:
        """The step (counted from 1) that consumes a position, which is none of those that are skipped."""
        samples, step, batch = [piece for piece in self.pieces if piece[0] <= position][-1]
        between = int(self.skips.consumed(position)) - int(self.skips.consumed(samples))
        return step + between // batch + 1

    def batch_of(self, step: int) -> tuple[int, int]:
        """(first position, global batch size) of a step, counted from 1; also of one that is still to come."""
        samples, before, batch = [piece for piece in self.pieces if piece[1] < step][-1]
        consumed = int(self.skips.consumed(samples)) + (step - 1 - before) * batch
        return int(self.skips.position_of(consumed)), batch


def history_of(run: ExistingRun) -> History:
    committed = 0 if run.manifest is None else run.manifest.samples
    pieces = [(0, 0, run.config.train.global_batch_size)]
    reached = 0
    try:
        records = read_journal(run.run_dir / JOURNAL_NAME)
    except FileNotFoundError:
        records = []
    for record in records:
        event = record.get("event")
        # From here the run goes on: what it did beyond is done again.
        if event in ("data", "data_change", "rollback"):
            reached = int(record["samples"])
        if event in ("data", "rollback"):
            pieces = [piece for piece in pieces if piece[0] < reached]
            pieces.append((reached, int(record["step"]), int(record["global_batch_size"])))
        if event == "step":
            reached = max(reached, int(record["samples"]))
    return History(
        reached=max(reached, committed),
        committed=committed,
        pieces=tuple(pieces),
        skips=run.data.stream.skips,
    )
