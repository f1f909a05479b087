"""What a run consumes, position by position: its datasets' orders put together. Called by loader.py.

A run's positions g = 0, 1, 2, … are one stream, whatever it is made of. Like order.py this is arithmetic,
without I/O or state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.order import Int64s, Order


class Place(NamedTuple):
    """Where one sample stands: in row `row` of chunk `chunk` of dataset number `dataset` of the stream."""

    dataset: int
    chunk: int
    row: int


class Places(NamedTuple):
    """Where n samples stand; see `Place`."""

    datasets: Int64s  # [n]
    chunks: Int64s  # [n]
    rows: Int64s  # [n]


class Stream:
    """The positions of a run over one dataset."""

    def __init__(self, order: Order) -> None:
        self._order = order

    @property
    def lanes(self) -> int:
        return self._order.lanes

    @property
    def samples_by_dataset(self) -> tuple[int, ...]:
        """How many samples each dataset holds, in the order of `Place.dataset`."""
        return (self._order.num_samples,)

    def fingerprint(self) -> dict[str, Any]:
        """What, beside the datasets' identities, decides the stream. Stored with a run; a change is refused."""
        return dict(self._order.fingerprint())

    def epoch(self, positions: npt.ArrayLike) -> Int64s:
        """int64[n]: the epoch that each position belongs to."""
        return self._order.epoch(positions)

    def batch(self, start: int, size: int) -> Int64s:
        """int64[size]: the positions [start, start + size), in the order of `Order.batch`."""
        return self._order.batch(start, size)

    def locate(self, positions: npt.ArrayLike) -> Places:
        """Where the samples of positions int[n] >= 0 stand."""
        chunks, rows = self._order.locate(positions)
        return Places(np.zeros_like(chunks), chunks, rows)

    def substitutes(self, position: int) -> Iterator[Place]:
        """What may stand at `position` in place of its own sample, in the order in which it is tried."""
        for chunk, row in self._order.substitutes(position):
            yield Place(0, chunk, row)
