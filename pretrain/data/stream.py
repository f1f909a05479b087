"""What a run consumes, position by position: its datasets' orders put together. Called by loader.py.

A run's positions g = 0, 1, 2, … are one stream, whatever it is made of. A *segment* is a stretch of it, from
its start to the next one's, that draws on the same datasets in the same shares; a run has one until its data
is changed. In a segment of several datasets each owns some of the L lanes, in proportion to its weight:
position g stands in row (g - start) // L of lane (g - start) % L, and a dataset d that owns L_d lanes counts
its own positions row · L_d + (which of its lanes), on which its own order works as if it were alone. So every
L positions hold the shares exactly, and each dataset's samples come once in an epoch of its own.

Intervals of positions may be skipped (`skips.py`): they are not consumed, and batches are made of the others.

Like order.py this is arithmetic, without I/O or state.
"""

# L lanes of the run, L_d lanes of dataset d, N_d samples of dataset d

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.excluded import ExcludingOrder
from pretrain.data.order import Int64s, Order, shuffled_lanes
from pretrain.data.selected import SelectedOrder
from pretrain.data.skips import Skips
from pretrain.errors import UsageError

_SEGMENT_SERIES = 1 << 16  # series of a segment's orders; more than a segment has datasets


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


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset's share of a segment.

    dataset: its number in the stream. chunk_samples: int[M]. weight: its share before it is rounded to
    lanes. excluded: int64[n] sorted numbers of the samples that are not to be shown; selected: of the only ones
    that are.
    """

    dataset: int
    chunk_samples: npt.NDArray[Any]
    weight: float = 1.0
    excluded: Int64s | None = None
    selected: Int64s | None = None


class Segment:
    """The positions from `start` on, counted from 0 here, over the datasets of `sources`.

    number: of the segment in its run; with it, the same dataset is shuffled anew after a change.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seed: int,
        lanes: int,
        start: int = 0,
        number: int = 0,
        block_chunks: int = 4,
    ) -> None:
        assert lanes % 2 == 0, f"a run's lanes are even: got {lanes}"
        assert 0 < len(sources) < _SEGMENT_SERIES, f"a segment of {len(sources)} datasets"
        self.start, self.lanes = start, lanes
        self.lanes_by_source = share_lanes([source.weight for source in sources], lanes=lanes)
        self.datasets = tuple(source.dataset for source in sources)
        self.orders: list[Order | ExcludingOrder | SelectedOrder] = []
        for i, source in enumerate(sources):
            settings: dict[str, Any] = {
                "chunk_samples": source.chunk_samples,
                "seed": seed,
                "lanes": self.lanes_by_source[i],
                "block_chunks": block_chunks,
                "series": number * _SEGMENT_SERIES + i,
            }
            if source.selected is not None:
                assert source.excluded is None, "the data of a run of a part of it is not changed"
                self.orders.append(SelectedOrder(source.selected, **settings))
                continue
            order = Order(**settings)
            excluded = source.excluded
            without = excluded is not None and len(excluded) > 0
            self.orders.append(ExcludingOrder(order, excluded) if without and excluded is not None else order)
        self.num_samples = sum(order.num_samples for order in self.orders)
        # Lanes are handed out shuffled, so that pairs, half the lanes apart, mix datasets by their shares.
        owners = np.repeat(np.arange(len(sources)), self.lanes_by_source)
        if len(sources) > 1:
            owners = owners[shuffled_lanes(seed=seed, series=number * _SEGMENT_SERIES, lanes=lanes)]
        self._owner = owners.astype(np.int64)  # int64[L]: the source that owns a lane
        self._lane_inside = np.empty(lanes, np.int64)  # int64[L]: which of its source's lanes it is
        for i in range(len(sources)):
            self._lane_inside[owners == i] = np.arange(self.lanes_by_source[i])
        self._lanes_by_source = np.array(self.lanes_by_source, np.int64)

    def own_positions(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """(number of the source, position in its own order), int64[n] each, of positions in this segment."""
        rows, lanes = np.divmod(positions, self.lanes)
        sources = self._owner[lanes]
        return sources, rows * self._lanes_by_source[sources] + self._lane_inside[lanes]

    def positions_of(self, source: int, own: Int64s) -> Int64s:
        """The inverse of `own_positions`."""
        rows, inside = np.divmod(own, self.lanes_by_source[source])
        return rows * self.lanes + np.flatnonzero(self._owner == source)[inside]

    def locate(self, positions: Int64s) -> Places:
        if len(self.orders) == 1:
            chunks, rows = self.orders[0].locate(positions)
            return Places(np.full_like(chunks, self.datasets[0]), chunks, rows)
        sources, own = self.own_positions(positions)
        places = Places(*(np.empty_like(positions) for _ in range(3)))
        for i, order in enumerate(self.orders):
            here = sources == i
            places.datasets[here] = self.datasets[i]
            places.chunks[here], places.rows[here] = order.locate(own[here])
        return places

    def substitutes(self, position: int) -> Iterator[Place]:
        sources, own = self.own_positions(np.array([position], np.int64))
        source = int(sources[0])
        for chunk, row in self.orders[source].substitutes(int(own[0])):
            yield Place(self.datasets[source], chunk, row)

    def epoch(self, positions: Int64s) -> Int64s:
        """int64[n]: the epoch of each position's own dataset, counted from the segment's start."""
        sources, own = self.own_positions(positions)
        sizes = np.array([order.num_samples for order in self.orders], np.int64)
        return own // sizes[sources]

    def epochs_by_source(self, consumed: int) -> list[float]:
        """How many epochs of each dataset the first `consumed` positions hold."""
        rows, rest = divmod(consumed, self.lanes)
        return [
            (rows * self.lanes_by_source[i] + int(np.count_nonzero(self._owner[:rest] == i)))
            / order.num_samples
            for i, order in enumerate(self.orders)
        ]

    def batch(self, start: int, size: int) -> Int64s:
        if len(self.orders) == 1:
            return self.orders[0].batch(start, size)
        positions = np.arange(start, start + size, dtype=np.int64)
        rows, lanes = np.divmod(positions, self.lanes)
        return positions[np.lexsort((lanes, rows, lanes % (self.lanes // 2)))]  # last key sorts first


class Stream:
    """The positions of a run over its segments, or over one dataset's order alone.

    num_datasets: how many datasets can be read, all by default; those with higher numbers are gone.
    skipped: intervals [start, stop) of positions that are not consumed, multiples of the lanes.
    """

    def __init__(
        self,
        segments: Order | Sequence[Segment],
        *,
        num_datasets: int | None = None,
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        if isinstance(segments, Order):
            segments = [_alone(segments)]
        assert segments, "a stream has a segment"
        assert segments[0].start == 0, "the first segment starts at 0"
        self.segments = tuple(segments)
        self._num_datasets = num_datasets
        self.lanes = segments[0].lanes
        assert all(segment.lanes == self.lanes for segment in segments), "a run keeps its lanes"
        self._starts = np.array([segment.start for segment in segments], np.int64)
        assert np.all(np.diff(self._starts) >= 0), "segments follow each other"
        self.skips = Skips(skipped)
        for interval in self.skips.intervals:
            assert not any(edge % self.lanes for edge in interval), (
                f"skipped {interval}, of {self.lanes} lanes: pairs"
            )

    def skipping(self, skipped: Sequence[tuple[int, int]]) -> Stream:
        """The same positions, of which these intervals are not consumed."""
        return Stream(self.segments, num_datasets=self._num_datasets, skipped=skipped)

    @property
    def samples_by_dataset(self) -> tuple[int, ...]:
        """How many samples each dataset that can be read holds, in the order of `Place.dataset`."""
        sizes = {
            dataset: order.num_dataset_samples if isinstance(order, SelectedOrder) else order.num_samples
            for segment in self.segments
            for dataset, order in zip(segment.datasets, segment.orders, strict=True)
        }
        count = len(sizes) if self._num_datasets is None else self._num_datasets
        return tuple(sizes[dataset] for dataset in range(count))

    def fingerprint(self) -> dict[str, Any]:
        """What, beside the segments' datasets, decides the stream. Stored with a run; a change is refused."""
        first = self.segments[0].orders[0]
        order = first.order if isinstance(first, ExcludingOrder) else first
        samples = sum(order.num_samples for order in self.segments[0].orders)
        return {**order.fingerprint(), "lanes": self.lanes, "num_samples": samples}

    def segment_of(self, positions: npt.ArrayLike) -> Int64s:
        """int64[n]: the number of the segment that each position belongs to."""
        return np.searchsorted(self._starts, np.asarray(positions, np.int64), side="right") - 1

    def end_of(self, number: int) -> int | None:
        """Where a segment ends and the next begins; None for the last."""
        return None if number == len(self.segments) - 1 else self.segments[number + 1].start

    def epoch(self, positions: npt.ArrayLike) -> Int64s:
        """int64[n]: the epoch of each position's own dataset, from 0 again in every segment."""
        wanted = np.asarray(positions, np.int64)
        epochs = np.empty_like(wanted)
        for segment, here in self._by_segment(wanted):
            epochs[here] = segment.epoch(wanted[here] - segment.start)
        return epochs

    def epochs(self, consumed: int) -> float:
        """How often the data has been gone through after `consumed` positions: each segment's positions over
        the sum of its datasets' samples. For one dataset, its epochs.
        """
        total = 0.0
        for number, segment in enumerate(self.segments):
            end = self.end_of(number)
            stop = consumed if end is None else min(end, consumed)
            total += max(0, stop - segment.start) / segment.num_samples
        return total

    def samples_for(self, epochs: float) -> float:
        """How many positions it takes until `self.epochs` says `epochs`."""
        last = self.segments[-1]
        for number, segment in enumerate(self.segments[:-1]):
            end = self.end_of(number)
            assert end is not None
            if self.epochs(end) >= epochs:
                return segment.start + (epochs - self.epochs(segment.start)) * segment.num_samples
        return last.start + (epochs - self.epochs(last.start)) * last.num_samples

    def batch(self, start: int, size: int) -> Int64s:
        """int64[size]: the next `size` positions from `start` on that are consumed, arranged as by `Order.batch`:
        neighbours 2i and 2i + 1 are a pair from lanes far apart, and a contiguous slice has few lanes.

        Segments and skipped intervals begin and end between pairs: at multiples of the lanes, as batches do.
        """
        parts = []
        for begin, stop in self.skips.pieces(start, size):
            cuts = [begin, *(cut for cut in self._starts.tolist() if begin < cut < stop), stop]
            for first, end in itertools.pairwise(cuts):
                segment = self.segments[int(self.segment_of(first))]
                parts.append(segment.start + segment.batch(first - segment.start, end - first))
        return np.concatenate(parts)

    def after(self, start: int, size: int) -> int:
        """The position behind the last of `batch(start, size)`: where the next batch starts."""
        return self.skips.pieces(start, size)[-1][1]

    def locate(self, positions: npt.ArrayLike) -> Places:
        """Where the samples of positions int[n] >= 0 stand."""
        wanted = np.asarray(positions, np.int64)
        assert np.all(wanted >= 0), "positions are a list of numbers from 0 up"
        places = Places(*(np.empty_like(wanted) for _ in range(3)))
        for segment, here in self._by_segment(wanted):
            found = segment.locate(wanted[here] - segment.start)
            for column, part in zip(places, found, strict=True):
                column[here] = part
        return places

    def substitutes(self, position: int) -> Iterator[Place]:
        """What may stand at `position` in place of its own sample, in the order in which it is tried."""
        segment = self.segments[int(self.segment_of(position))]
        return segment.substitutes(position - segment.start)

    def _by_segment(self, positions: Int64s) -> Iterator[tuple[Segment, Any]]:
        """The segments that positions belong to, and where those positions are in the array."""
        if len(self.segments) == 1:
            yield self.segments[0], slice(None)
            return
        numbers = self.segment_of(positions)
        for number in np.unique(numbers).tolist():
            yield self.segments[number], numbers == number


def _alone(order: Order) -> Segment:
    source = Source(dataset=0, chunk_samples=order.chunk_samples)
    return Segment([source], seed=order.seed, lanes=order.lanes, block_chunks=order.block_chunks)


def share_lanes(weights: Sequence[float], *, lanes: int) -> tuple[int, ...]:
    """How many of the lanes each dataset owns: in proportion to the weights by largest remainder (of equal
    ones the first), and at least one each. UsageError when there are more datasets than lanes.
    """
    assert all(weight > 0 for weight in weights), f"weights are positive: got {weights}"
    if len(weights) > lanes:
        raise UsageError(
            f"{len(weights)} datasets cannot share {lanes} lanes, each needs one; take fewer datasets, "
            "or a run with a larger train.global_batch_size"
        )
    exact = {i: Fraction(weight) for i, weight in enumerate(weights)}
    shares: dict[int, int] = {}
    while True:  # those too light for a lane get one, and the others share what is left
        left = lanes - len(shares)
        total = sum(exact.values(), Fraction(0))
        quotas = {i: weight * left / total for i, weight in exact.items()}
        light = [i for i, quota in quotas.items() if quota < 1]
        if not light:
            break
        for i in light:
            shares[i] = 1
            del exact[i]
    floors = {i: int(quota) for i, quota in quotas.items()}
    spare = left - sum(floors.values())
    by_remainder = sorted(quotas, key=lambda i: (floors[i] - quotas[i], i))
    shares |= {i: floors[i] + (i in by_remainder[:spare]) for i in quotas}
    return tuple(shares[i] for i in range(len(weights)))
