"""Train on a part of a dataset: which samples, and their order. Called by datasets.py and stream.py.

The part has an order of its own, as a dataset has that holds nothing else: chunks keep what was chosen of them, those
of which nothing was are gone. So every promise of order.py holds for it, and an epoch is as long as the part.
"""

# N samples of the dataset, n of them chosen, C classes

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.excluded import Standings
from pretrain.data.order import Int64s, Order, locate_sample, sample_ends

_FRACTION = 0xF2AC  # the stream that chooses; no sample's and no order's


def choose_fraction(labels: npt.NDArray[np.int32], fraction: float, *, seed: int) -> Int64s:
    """Numbers of the samples to train on, ascending: about fraction * N, int64.

    labels int32[N], -1 for none. Classes get places in proportion to their samples (largest remainder), and at least
    one; what has no label counts as one more class. Within a class the samples come by random words of their own,
    keyed by `seed`: of two fractions the smaller one's samples are the larger one's too, but for the remainders.
    """
    assert 0 < fraction <= 1, f"a part of the data: got {fraction}"
    classes, number, totals = np.unique(labels, return_inverse=True, return_counts=True)
    quotas = np.maximum(1, proportional(totals, round(fraction * len(labels))))
    words = np.random.Philox(key=np.array([seed, _FRACTION], np.uint64)).random_raw(len(labels))
    by_class = np.lexsort((words, number))
    ordered = number[by_class]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, np.arange(len(classes)))[ordered]
    return np.sort(by_class[place < quotas[ordered]]).astype(np.int64)


def proportional(totals: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """`count` places shared out in proportion to `totals`: largest remainders get what is left."""
    exact = totals * (count / totals.sum())
    places = np.floor(exact).astype(np.int64)
    left = count - int(places.sum())
    places[np.argsort(places - exact, kind="stable")[:left]] += 1
    return places


class SelectedOrder:
    """The order of the samples `selected` alone: int64[n], sorted sample numbers, in storage order.

    Eight bytes a chosen sample. The rest as for `Order`, whose positions count the chosen ones.
    """

    def __init__(
        self,
        selected: Int64s,
        *,
        chunk_samples: npt.NDArray[Any],
        seed: int,
        lanes: int,
        block_chunks: int = 4,
        series: int = 0,
    ) -> None:
        assert len(selected), "nothing would be left"
        assert np.all(np.diff(selected) > 0), "selected sample numbers are sorted, each once"
        self.selected = np.ascontiguousarray(selected, np.int64)
        self._ends = sample_ends(np.asarray(chunk_samples))
        self.num_dataset_samples = int(self._ends[-1])
        assert 0 <= selected[0] <= selected[-1] < self.num_dataset_samples, "no such sample"
        chunks, _ = locate_sample(self._ends, self.selected)
        _, counts = np.unique(chunks, return_counts=True)
        self._starts = np.cumsum(counts) - counts  # of each chunk's part in `selected`
        self.order = Order(
            chunk_samples=counts, seed=seed, lanes=lanes, block_chunks=block_chunks, series=series
        )

    @property
    def num_samples(self) -> int:
        return self.order.num_samples

    @property
    def lanes(self) -> int:
        return self.order.lanes

    @property
    def small(self) -> bool:
        return self.order.small

    @property
    def window_samples(self) -> int:
        return self.order.window_samples

    def fingerprint(self) -> dict[str, Any]:
        """The order's, and which samples it is of."""
        digest = hashlib.sha256(self.selected.astype("<i8").tobytes()).hexdigest()
        return {**self.order.fingerprint(), "selected": digest}

    def epoch(self, positions: npt.ArrayLike) -> Int64s:
        return self.order.epoch(positions)

    def batch(self, start: int, size: int) -> Int64s:
        return self.order.batch(start, size)

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """(chunk int64[n], row in that chunk int64[n]) of positions int[n] >= 0, as the dataset has them."""
        return self._in_dataset(*self.order.locate(positions))

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        for chunk, row in self.order.substitutes(position):
            chunks, rows = self._in_dataset(np.array([chunk], np.int64), np.array([row], np.int64))
            yield int(chunks[0]), int(rows[0])

    def positions_of(self, chunks: Int64s, rows: Int64s, *, epoch: int) -> Standings:
        """Where samples stand in an epoch; those that were not chosen stand nowhere."""
        samples = np.where(chunks > 0, self._ends[chunks - 1], 0).astype(np.int64) + rows
        at = np.minimum(np.searchsorted(self.selected, samples), len(self.selected) - 1)
        which = np.flatnonzero(self.selected[at] == samples)
        parts = np.searchsorted(self._starts, at[which], side="right") - 1
        own = self.order.positions_of(parts, at[which] - self._starts[parts], epoch=epoch)
        return Standings(which, own, np.zeros(len(which), bool))

    def _in_dataset(self, parts: Int64s, rows: Int64s) -> tuple[Int64s, Int64s]:
        return locate_sample(self._ends, self.selected[self._starts[parts] + rows])
