"""Which ranks hold the others up: their compute time before the first collective, compared. Called by reporter.py.

Ranks leave a collective together, so a step's wall time is the same on all of them. What differs is
how long a rank computes between its data's arrival and the first exchange of gradients.

A rank is slow when it took `ratio` times what the middle rank took (and some milliseconds more) in
three of four of the last `window_steps` steps, and mostly has for `seconds`. Noise meets now this rank, now that one,
and does not add up; a processor that is shared for a while makes one rank slow, but not for so long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_SLOW_SHARE = 0.75  # of the window's steps …
_WELL_SHARE = 0.5  # … and below it the rank is well again
_LEAST_SECONDS = 0.01  # smaller differences are the scheduler's, and cost little


class Finding(NamedTuple):
    """A rank has become slow, or is well again."""

    rank: int
    is_slow: bool
    seconds: float  # the median of its steps in the window
    others_seconds: float  # the middle rank's


class SlowRanks:
    """Compares the ranks step by step; `clock` is monotonic."""

    def __init__(
        self,
        *,
        ratio: float,
        window_steps: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ratio, self._window_steps, self._seconds, self._clock = ratio, window_steps, seconds, clock
        self._steps = 0
        self._taken = np.zeros((window_steps, 0))  # seconds, a row a step, a column a rank
        self._was_slow = np.zeros((window_steps, 0), bool)
        self._since: dict[int, float] = {}  # when a rank began to be slow in most steps
        self.slow: set[int] = set()

    def add(self, seconds: Sequence[float]) -> list[Finding]:
        """One step, in rank order. What has changed by it."""
        taken = np.asarray(seconds)
        if self._taken.shape[1] != len(taken):
            self._taken = np.zeros((self._window_steps, len(taken)))
            self._was_slow = np.zeros((self._window_steps, len(taken)), bool)
            self._steps = 0
        middle = np.sort(taken)[(len(taken) - 1) // 2]  # of two ranks, the faster
        row = self._steps % self._window_steps
        self._taken[row] = taken
        self._was_slow[row] = taken > max(self._ratio * middle, middle + _LEAST_SECONDS)
        self._steps += 1
        if self._steps < self._window_steps:
            return []
        return self._judge(self._was_slow.mean(axis=0))

    @property
    def medians(self) -> list[float]:
        """Seconds by rank over the window's steps; empty before the first step."""
        known = self._taken[: self._steps]
        return np.median(known, axis=0).tolist() if len(known) else []

    def _judge(self, shares: np.ndarray) -> list[Finding]:
        now = self._clock()
        begun = {rank for rank in self._since if shares[rank] >= _WELL_SHARE}
        begun.update(np.flatnonzero(shares >= _SLOW_SHARE).tolist())
        self._since = {rank: self._since.get(rank, now) for rank in begun}
        newly = {rank for rank, since in self._since.items() if now - since >= self._seconds} - self.slow
        well = {rank for rank in self.slow if shares[rank] < _WELL_SHARE}
        if not newly and not well:
            return []
        self.slow = (self.slow | newly) - well
        medians = self.medians
        middle = sorted(medians)[(len(medians) - 1) // 2]
        return [Finding(rank, rank in newly, medians[rank], middle) for rank in sorted(newly | well)]
