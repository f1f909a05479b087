"""Turn positions into samples: pure arithmetic, no I/O, no state. Called by stream.py and loader.py.

A run consumes positions g = 0, 1, 2, … for ever. Epoch g // N holds each of the N samples once. Which
sample stands at g depends on the dataset's chunk sizes, the seed and g only, never on ranks, workers,
restarts or on how the order was asked.

Large data: each epoch the chunks are shuffled, and their samples, laid end to end, form a *virtual list*,
cut into L lanes. Neighbouring positions come from neighbouring lanes, so a batch mixes L places of the
dataset; inside a lane, samples are shuffled within blocks of about K chunks, so that a few open chunks a
lane are enough to serve it. Small data (N <= L·K·C): a plain permutation of the samples.
"""

# N samples, M chunks, C samples in a typical chunk, K chunks a block, L lanes, B global batch, R ranks

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.errors import UsageError

ORDER_VERSION = 1
MAX_LANES = 256
PAD = -1

Int64s = npt.NDArray[np.int64]
Value = TypeVar("Value")

# What a Philox stream is for. It stands in the low bits of the counter's second word, where no stream of
# another purpose gets to by counting; above it stands the number of the order within its run.
# keyed.py starts its own streams above these.
_CHUNKS, _BLOCK, _SAMPLES, _LANES = 0, 1, 2, 3
_PURPOSE_BITS = 8


def lanes_for(global_batch_size: int) -> int:
    """The largest even divisor of the global batch not above 256. UsageError for an odd batch."""
    if global_batch_size < 2 or global_batch_size % 2:
        raise UsageError(
            f"the global batch size must be even and at least 2: got {global_batch_size}; "
            "images are paired for mixing, so take the next even number"
        )
    largest = min(MAX_LANES, global_batch_size)
    return next(lanes for lanes in range(largest - largest % 2, 0, -2) if global_batch_size % lanes == 0)


def permutation(*, key: tuple[int, int], counter: tuple[int, int, int, int], size: int) -> npt.NDArray[Any]:
    """A permutation of range(size) from one Philox stream, int32 (int64 above 2**31 entries).

    The numbers are sorted by random words that carry them in their low bits: no ties, no second
    array. Only `random_raw` is used, whose stream NumPy does not change; its shuffles may change.
    """
    words = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)).random_raw(
        size
    )
    low_bits = np.uint64(max(1, (size - 1).bit_length()))
    words >>= low_bits
    words <<= low_bits
    piece = 1 << 20  # in pieces: a second array of 14 M words would cost as much as the first
    for start in range(0, size, piece):
        stop = min(start + piece, size)
        words[start:stop] |= np.arange(start, stop, dtype=np.uint64)
    words.sort()
    words &= (np.uint64(1) << low_bits) - np.uint64(1)
    return words.astype(np.int32 if size < 2**31 else np.int64)


def purpose_word(purpose: int, series: int) -> int:
    """The counter's second word of a stream; `series` is the number of an order within its run."""
    return purpose + (series << _PURPOSE_BITS)


def shuffled_lanes(*, seed: int, series: int, lanes: int) -> npt.NDArray[Any]:
    """A permutation of range(lanes), by which a mixture hands its lanes out (`stream.py`)."""
    return permutation(key=(seed, 0), counter=(0, purpose_word(_LANES, series), 0, 0), size=lanes)


class Block(NamedTuple):
    """Neighbours in one lane, within which samples are shuffled. Small data: the whole epoch, lane 0."""

    epoch: int
    lane: int
    number: int  # of the block in its lane


@dataclass(frozen=True, kw_only=True)
class _EpochTable:
    """One epoch's list: the chunks (or, for small data, samples) in their shuffled order."""

    shuffled: npt.NDArray[Any]  # chunk numbers in lane mode, sample numbers for small data
    ends: npt.NDArray[Any]  # lane mode: where each shuffled chunk ends in the virtual list


class Recent(OrderedDict[tuple[int, ...], Value]):
    """The most recently used results of a pure function."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def get_or_make(self, key: tuple[int, ...], make: Callable[[], Value]) -> Value:
        if key in self:
            self.move_to_end(key)
            return self[key]
        while len(self) >= self.capacity:
            self.popitem(last=False)
        value = self[key] = make()
        return value


class Order:
    """The order of one dataset under one seed.

    chunk_samples: int[M], samples in each chunk, in the dataset's own order. seed: 0 <= seed < 2**64.
    lanes: from `lanes_for`, fixed when a run is created; a part of them, also an odd number, where the
    dataset is one of a mixture. block_chunks: K. series: tells the orders of one run apart, so that two
    datasets of a mixture, or one dataset before and after a change, are not shuffled alike.

    Tables of the two most recent epochs are kept (112 MB each for 14 M chunks), so it is held once a
    rank: loader workers are told chunks and rows, and need no Order. Pickles without the tables.
    """

    def __init__(
        self,
        *,
        chunk_samples: npt.NDArray[Any],
        seed: int,
        lanes: int,
        block_chunks: int = 4,
        series: int = 0,
    ) -> None:
        assert 1 <= lanes < 2**31, f"an order has at least one lane: got {lanes}"
        assert 0 <= series < 2**56, f"a series is a number of 56 bits: got {series}"
        assert block_chunks >= 1, f"a block holds at least one chunk: got {block_chunks}"
        assert 0 <= seed < 2**64, f"a seed is a 64-bit word: got {seed}"
        self.chunk_samples = np.ascontiguousarray(chunk_samples, dtype=np.int32)
        self.num_samples = int(self.chunk_samples.sum(dtype=np.int64))
        assert self.num_samples > 0, "a dataset without samples has no order"
        self.seed, self.lanes, self.block_chunks, self.series = seed, lanes, block_chunks, series
        # C is the mean, not the largest: one odd chunk must not widen every block.
        typical_chunk = -(-self.num_samples // len(self.chunk_samples))
        self.block_rows = block_chunks * typical_chunk
        self.small = self.num_samples <= lanes * self.block_rows
        self._forget()

    @property
    def window_samples(self) -> int:
        """Samples of the blocks that all lanes have open: what is in flight over all ranks."""
        return self.num_samples if self.small else min(self.num_samples, self.lanes * self.block_rows)

    def _forget(self) -> None:
        # Each lane stands in one block, or in two while a batch crosses from one to the next; a third for
        # the epoch that begins in the same batch.
        self._blocks: Recent[npt.NDArray[Any]] = Recent(3 * self.lanes)
        self._epochs: Recent[_EpochTable] = Recent(2)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_blocks", "_epochs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def fingerprint(self) -> dict[str, int]:
        """What, beside the dataset's identity, decides the order. Stored with a run; a change is refused."""
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "block_chunks": self.block_chunks,
            "num_samples": self.num_samples,
        }

    def epoch(self, positions: npt.ArrayLike) -> Int64s:
        """int64[n]: the epoch that each position belongs to."""
        return np.asarray(positions, np.int64) // self.num_samples

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """(chunk int64[n], row in that chunk int64[n]) of positions int[n] >= 0."""
        wanted = np.asarray(positions, np.int64)
        assert np.all(wanted >= 0), "positions are a list of numbers from 0 up"
        epochs, offsets = np.divmod(wanted, self.num_samples)
        chunks, rows = np.empty_like(wanted), np.empty_like(wanted)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            table = self._epoch_table(epoch)
            if self.small:
                chunks[here], rows[here] = locate_sample(table.ends, table.shuffled[offsets[here]])
            else:
                slots, rows[here] = locate_sample(table.ends, self._virtual(epoch, offsets[here]))
                chunks[here] = table.shuffled[slots]
        return chunks, rows

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """(chunk, row) of the other samples of the position's block, from the next one on, wrapping round.

        For small data the block is the whole permutation. The first and the last block of a lane may be as
        short as one row: after less than half a block, the blocks that follow are gone through as well. This
        is the order in which a sample that cannot be used is replaced: a function of the position, like all
        else here.
        """
        tried = 0
        for others in self.from_next(position):
            for other in others.tolist():
                chunks, rows = self.locate([other])
                yield int(chunks[0]), int(rows[0])
            tried += len(others)
            if tried >= self.enough_substitutes:
                return

    @property
    def enough_substitutes(self) -> int:
        """With so many tried, no further block is gone through for one."""
        return self.block_rows // 2

    def from_next(self, position: int) -> Iterator[Int64s]:
        """The positions of the block after `position`, wrapping round, without it; then block after block those
        of the blocks that follow, once round the epoch.
        """
        epochs, lanes, numbers, indices = self.blocks_of([position])
        own = block = Block(int(epochs[0]), int(lanes[0]), int(numbers[0]))
        yield np.roll(self.block_positions(own), -int(indices[0]))[1:]
        while (block := self.next_block(block)) != own:
            yield self.block_positions(block)

    def blocks_of(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """(epoch, lane, number of the block in its lane, place in the block) of positions, int64[n] each."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        if self.small:
            return epochs, np.zeros_like(offsets), np.zeros_like(offsets), offsets
        rows, lanes = np.divmod(offsets, self.lanes)
        numbers = self._block_of(rows, lanes)
        starts = np.maximum(0, numbers * self.block_rows - self._stagger(lanes))
        return epochs, lanes, numbers, rows - starts

    def block_positions(self, block: Block) -> Int64s:
        """int64[samples of the block]: its positions, in the order in which they replace each other."""
        first = block.epoch * self.num_samples
        if self.small:
            return np.arange(first, first + self.num_samples, dtype=np.int64)
        start, end = self._block_rows(block.lane, block.number)
        return first + block.lane + np.arange(start, end, dtype=np.int64) * self.lanes

    def next_block(self, block: Block, *, step: int = 1) -> Block:
        """The block after (step 1) or before (-1): of the lane, past its end of the next lane, and round."""
        if self.small:
            return block
        lane, number = block.lane, block.number + step
        if not 0 <= number <= self._last_block(lane):
            lane = (lane + step) % self.lanes
            number = 0 if step > 0 else self._last_block(lane)
        return Block(block.epoch, lane, number)

    def positions_of(self, chunks: npt.ArrayLike, rows: npt.ArrayLike, *, epoch: int) -> Int64s:
        """int64[n]: where the samples (chunk, row) stand in an epoch, the inverse of `locate`.

        Costs the epoch's table, its inverse, and some 0.1 ms a sample, to shuffle its block.
        """
        chunks, rows = np.asarray(chunks, np.int64), np.asarray(rows, np.int64)
        table = self._epoch_table(epoch)
        first = epoch * self.num_samples
        if self.small:
            samples = np.where(chunks > 0, table.ends[chunks - 1], 0).astype(np.int64) + rows
            return first + _inverse(table.shuffled)[samples].astype(np.int64)
        slots = _inverse(table.shuffled)[chunks].astype(np.int64)
        places = np.where(slots > 0, table.ends[slots - 1], 0).astype(np.int64) + rows
        lane_rows, longer = divmod(self.num_samples, self.lanes)
        edge = longer * (lane_rows + 1)  # where the longer lanes end
        lanes = np.where(
            places < edge, places // (lane_rows + 1), longer + (places - edge) // max(1, lane_rows)
        )
        positions = np.empty_like(places)
        for i, (place, lane) in enumerate(zip(places.tolist(), lanes.tolist(), strict=True)):
            row = place - self._lane(lane)[0]
            block = int(self._block_of(row, lane))
            start, end = self._block_rows(lane, block)
            inside = np.flatnonzero(self._block(epoch, lane, block, end - start) == row - start)
            positions[i] = first + (start + int(inside[0])) * self.lanes + lane
        return positions

    def batch(self, start: int, size: int) -> Int64s:
        """int64[size]: the positions [start, start + size), arranged so that neighbours 2i and 2i+1 come
        from lanes half the lanes apart (the pairs that mixing uses) and a contiguous slice has few lanes.
        """
        assert min(start, size) >= 0, f"a batch starts at 0 or later: got {start}, {size}"
        assert self.lanes % 2 == 0, f"pairs come from two halves of the lanes: got {self.lanes} lanes"
        positions = np.arange(start, start + size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        rows, lanes = np.divmod(offsets, self.lanes)
        return positions[np.lexsort((lanes, rows, epochs, lanes % (self.lanes // 2)))]  # last key sorts first

    def _epoch_table(self, epoch: int) -> _EpochTable:
        return self._epochs.get_or_make((epoch,), lambda: self._make_epoch_table(epoch))

    def _make_epoch_table(self, epoch: int) -> _EpochTable:
        key = (self.seed, epoch)
        if self.small:
            counter = (0, purpose_word(_SAMPLES, self.series), 0, 0)
            samples = permutation(key=key, counter=counter, size=self.num_samples)
            return _EpochTable(shuffled=samples, ends=sample_ends(self.chunk_samples))
        counter = (0, purpose_word(_CHUNKS, self.series), 0, 0)
        chunks = permutation(key=key, counter=counter, size=len(self.chunk_samples))
        return _EpochTable(shuffled=chunks, ends=sample_ends(self.chunk_samples[chunks]))

    def _virtual(self, epoch: int, offsets: Int64s) -> Int64s:
        """Places in the epoch's virtual list, in lane mode, of offsets into the epoch."""
        rows, lanes = np.divmod(offsets, self.lanes)
        blocks = self._block_of(rows, lanes)
        places = np.empty_like(offsets)
        by_block = np.lexsort((blocks, lanes))
        changes = np.flatnonzero(np.diff(lanes[by_block]) | np.diff(blocks[by_block])) + 1
        for group in np.split(by_block, changes):
            lane, block = int(lanes[group[0]]), int(blocks[group[0]])
            lane_start, _ = self._lane(lane)
            block_start, block_end = self._block_rows(lane, block)
            shuffled = self._block(epoch, lane, block, block_end - block_start)
            places[group] = lane_start + block_start + shuffled[rows[group] - block_start]
        return places

    def _block_of(self, rows: Any, lanes: Any) -> Any:
        """The number of the block, in its lane, that a row belongs to."""
        return (rows + self._stagger(lanes)) // self.block_rows

    def _block_rows(self, lane: int, block: int) -> tuple[int, int]:
        """(first row, end) of a block in its lane."""
        _, lane_rows = self._lane(lane)
        start = max(0, block * self.block_rows - self._stagger(lane))
        return start, min((block + 1) * self.block_rows - self._stagger(lane), lane_rows)

    def _last_block(self, lane: int) -> int:
        return int(self._block_of(self._lane(lane)[1] - 1, lane))

    def _stagger(self, lanes: Any) -> Any:
        """Rows by which a lane's first block is shorter, so that lanes open new chunks one after another."""
        return lanes * self.block_rows // self.lanes

    def _lane(self, lane: int) -> tuple[int, int]:
        """(start in the virtual list, rows) of a lane; lengths differ by at most one."""
        rows, longer = divmod(self.num_samples, self.lanes)
        return lane * rows + min(lane, longer), rows + (lane < longer)

    def _block(self, epoch: int, lane: int, block: int, size: int) -> npt.NDArray[Any]:
        key, counter = (self.seed, epoch), (0, purpose_word(_BLOCK, self.series), lane, block)
        return self._blocks.get_or_make(
            (epoch, lane, block), lambda: permutation(key=key, counter=counter, size=size)
        )


def _inverse(shuffled: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Where each number stands in a permutation."""
    places = np.empty_like(shuffled)
    places[shuffled] = np.arange(len(shuffled), dtype=shuffled.dtype)
    return places


def sample_ends(chunk_samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Where each chunk ends when all are laid end to end; four bytes an entry as long as they suffice."""
    total = int(chunk_samples.sum(dtype=np.int64))
    return np.cumsum(chunk_samples, dtype=np.uint32 if total < 2**32 else np.int64)


def locate_sample(ends: npt.NDArray[Any], samples: npt.NDArray[Any]) -> tuple[Int64s, Int64s]:
    """(slot, row in it), int64[n] each, of places int[n] in chunks laid end to end (`sample_ends`)."""
    places = samples.astype(ends.dtype)  # else searchsorted would widen, that is copy, all of `ends`
    slots = np.searchsorted(ends, places, side="right").astype(np.int64)
    starts = np.where(slots > 0, ends[slots - 1], 0).astype(np.int64)
    return slots, places.astype(np.int64) - starts


def slice_batch(batch: Int64s, *, rank: int, world_size: int) -> Int64s:
    """One rank's part of a batch from `Order.batch`: int64[2 * ceil(B / 2 / R)].

    Whole pairs, contiguous; slices differ by at most one pair, and the shorter are padded with PAD.
    """
    assert len(batch) % 2 == 0, f"a batch is made of pairs: got {len(batch)} positions"
    pairs = _contiguous_slice(len(batch) // 2, rank=rank, world_size=world_size)
    both = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
    return np.where(both >= 0, batch[np.maximum(both, 0)], PAD) if len(batch) else both


def validation_slice(num_samples: int, *, rank: int, world_size: int) -> Int64s:
    """One rank's samples of a pass over the data in its own order: int64[ceil(N / R)], padded with PAD."""
    return _contiguous_slice(num_samples, rank=rank, world_size=world_size)


def _contiguous_slice(count: int, *, rank: int, world_size: int) -> Int64s:
    """Rank's part of range(count): int64[ceil(count / R)], parts differ by at most one, padded with PAD."""
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    size, longer = divmod(count, world_size)
    start = rank * size + min(rank, longer)
    own = np.arange(start, start + size + (rank < longer), dtype=np.int64)
    return np.pad(own, (0, -(-count // world_size) - len(own)), constant_values=PAD)
