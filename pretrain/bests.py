"""Validations that count: the best one's checkpoint is kept, and a run that gets no better ends. Called by train.py.

All ranks together: validation gives them the same numbers, so that all come to the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pretrain.checkpoint.best import EVENTS, BestWatch
from pretrain.distributed import World, from_main, together
from pretrain.metrics.journal import JOURNAL_NAME, read_events


class Bests:
    """kept, stopping: watches of the run's validations, for `checkpoint.keep_best` and `train.early_stopping`; None:
    not asked for. is_shared: do all ranks see one run_dir?
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        kept: BestWatch | None,
        stopping: BestWatch | None,
        world: World,
        is_shared: bool,
    ) -> None:
        self._run_dir, self._kept, self._stopping, self._world = run_dir, kept, stopping, world
        self._writes = world.is_main or (not is_shared and world.local_rank == 0)
        self.is_stuck = False  # is it time to stop?

    def begin(self, step: int) -> None:
        """Take up what earlier attempts measured up to `step`."""
        if self._kept is None and self._stopping is None:
            return
        records = from_main(self._world, lambda: read_events(self._run_dir / JOURNAL_NAME, EVENTS))
        for watch in (self._kept, self._stopping):
            if watch is not None:
                watch.read(records, up_to_step=step)
        self.is_stuck = self._stopping is not None and self._stopping.is_stuck
        self._write()

    def add(self, step: int, found: Mapping[str, float] | None) -> bool:
        """What validation found after `step`, if it was made. Is the network of that step to be kept?"""
        if found is None:
            return False
        if self._stopping is not None:
            self._stopping.add(step, found)
            self.is_stuck = self._stopping.is_stuck
        if self._kept is None or not self._kept.add(step, found):
            return False
        self._write()
        return True

    def go_back(self, step: int) -> None:
        """The run goes on from `step`."""
        for watch in (self._kept, self._stopping):
            if watch is not None:
                watch.go_back(step)
        self.is_stuck = False
        self._write()

    def _write(self) -> None:
        kept = self._kept
        if kept is not None:
            together(lambda: kept.write(self._run_dir) if self._writes else None)
