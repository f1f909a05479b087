"""Intervals of a run's positions that are jumped over: arithmetic, no I/O, no state. Called by stream.py.

After a loss spike a run goes back, and then leaves out the positions that it came from: its *consumed* positions
are the others, in their order. What stands at a position does not change by it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class Skips:
    """The positions outside of `intervals`, [start, stop) each; they may touch each other, not overlap."""

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self.intervals = tuple(sorted(intervals))
        for start, stop in self.intervals:
            assert 0 <= start < stop, f"an interval goes from a position to a later one: got {start}, {stop}"
        for (_, stop), (start, _) in itertools.pairwise(self.intervals):
            assert stop <= start, f"intervals overlap: one ends at {stop}, the next starts at {start}"
        self._starts = np.array([start for start, _ in self.intervals], np.int64)
        self._lengths = np.array([stop - start for start, stop in self.intervals], np.int64)
        self._before = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)  # skipped before each

    def __bool__(self) -> bool:
        return bool(self.intervals)

    def is_skipped(self, positions: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """bool[n]."""
        wanted = np.asarray(positions, np.int64)
        last = np.searchsorted(self._starts, wanted, side="right") - 1
        return (last >= 0) & (wanted - self._start(last) < self._length(last))

    def consumed(self, positions: npt.ArrayLike) -> Int64s:
        """int64[n]: how many of the positions below each are consumed."""
        wanted = np.asarray(positions, np.int64)
        last = np.searchsorted(self._starts, wanted, side="right") - 1
        partly = np.minimum(wanted - self._start(last), self._length(last))
        return wanted - np.where(last >= 0, self._before[np.maximum(last, 0)] + partly, 0)

    def position_of(self, consumed: npt.ArrayLike) -> Int64s:
        """int64[n]: the position that is consumed when so many have been; the inverse of `consumed`."""
        wanted = np.asarray(consumed, np.int64)
        begun = np.searchsorted(self._starts - self._before[:-1], wanted, side="right")
        return wanted + self._before[begun]

    def pieces(self, start: int, size: int) -> list[tuple[int, int]]:
        """The stretches [first, end) that the next `size` consumed positions from `start` on are made of."""
        found = []
        first = int(self.position_of(self.consumed(start)))
        while size > 0:
            ends = [begin for begin, _ in self.intervals if begin >= first]
            end = min([first + size, *ends])
            if end > first:
                found.append((first, end))
            size -= end - first
            first = int(self.position_of(self.consumed(end)))
        return found

    def _start(self, numbers: Int64s) -> Int64s:
        return self._starts[np.maximum(numbers, 0)] if self.intervals else np.zeros_like(numbers)

    def _length(self, numbers: Int64s) -> Int64s:
        return self._lengths[np.maximum(numbers, 0)] if self.intervals else np.zeros_like(numbers)
