"""The order of a dataset of which some samples are not to be shown. Called by stream.py.

The positions stay as they are; where an excluded sample would stand, another one stands in: the next one
of its block that is not excluded, wrapping round (small data: of the permutation). Of a block with none
left the next block fills in, at the same place counted round: the next of the lane, past the lane's end
the first of the next lane, and so on round the epoch. Pure arithmetic, like the order itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.order import Block, Int64s, Order, Recent, sample_ends


class Standings(NamedTuple):
    """At which positions samples stand: samples[which[i]] stands at positions[i]."""

    which: Int64s  # [n]
    positions: Int64s  # [n]
    stands_in: npt.NDArray[np.bool_]  # [n], for a sample that is excluded


class ExcludingOrder:
    """`order` without the samples `excluded`: int64[n], sorted sample numbers, in storage order.

    Numbers and not bits: eight bytes an excluded sample are less than a bit for every sample as long as
    fewer than one in 64 is excluded. Filling costs one look at every block that is met, kept as long as
    the order keeps its blocks.
    """

    def __init__(self, order: Order, excluded: Int64s) -> None:
        assert np.all(np.diff(excluded) > 0), "excluded sample numbers are sorted, each once"
        assert not len(excluded) or 0 <= excluded[0] <= excluded[-1] < order.num_samples, "no such sample"
        assert len(excluded) < order.num_samples, "nothing would be left"
        self.order, self.excluded = order, np.ascontiguousarray(excluded, np.int64)
        self._ends = sample_ends(order.chunk_samples)
        self._forget()

    def _forget(self) -> None:
        # As long as the order keeps its blocks; small data has one block an epoch, as large as the data.
        self._fills: Recent[Int64s | None] = Recent(2 if self.order.small else 3 * self.order.lanes)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fills"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def num_samples(self) -> int:
        """Positions an epoch; excluded samples count, for their positions are filled."""
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

    def epoch(self, positions: npt.ArrayLike) -> Int64s:
        return self.order.epoch(positions)

    def batch(self, start: int, size: int) -> Int64s:
        return self.order.batch(start, size)

    def sample_numbers(self, chunks: Int64s, rows: Int64s) -> Int64s:
        return np.where(chunks > 0, self._ends[chunks - 1], 0).astype(np.int64) + rows

    def is_excluded(self, samples: Int64s) -> npt.NDArray[np.bool_]:
        if not len(self.excluded):
            return np.zeros(np.shape(samples), bool)
        found = np.searchsorted(self.excluded, samples)
        return self.excluded[np.minimum(found, len(self.excluded) - 1)] == samples

    def locate(self, positions: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """(chunk int64[n], row in that chunk int64[n]) of positions int[n] >= 0; none is excluded."""
        wanted = np.asarray(positions, np.int64)
        chunks, rows = self.order.locate(wanted)
        out = np.flatnonzero(self.is_excluded(self.sample_numbers(chunks, rows)))
        if len(out):
            chunks[out], rows[out] = self.order.locate(self.stand_ins(wanted[out]))
        return chunks, rows

    def stand_ins(self, positions: Int64s) -> Int64s:
        """int64[n]: for each position, the one whose sample stands there: itself where that is not excluded."""
        keys = np.stack(self.order.blocks_of(positions), axis=1)
        blocks, block_of = np.unique(keys[:, :3], axis=0, return_inverse=True)
        filled = np.empty(len(positions), np.int64)
        for number, key in enumerate(blocks.tolist()):
            here = np.flatnonzero(block_of.reshape(-1) == number)
            block, fill = self._first_with_any_left(Block(*key))
            places = self.order.block_positions(block)
            filled[here] = places[fill[keys[here, 3] % len(places)]]
        return filled

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """(chunk, row) of what may replace the sample that stands at `position`; see `Order.substitutes`.

        Excluded samples do not count as tried: a block that has few others leans on the next, as it does
        for filling.
        """
        standing = int(self.stand_ins(np.array([position], np.int64))[0])
        tried = 0
        for others in self.order.from_next(standing):
            for other in others.tolist():
                chunks, rows = self.order.locate([other])
                if not self.is_excluded(self.sample_numbers(chunks, rows))[0]:
                    tried += 1
                    yield int(chunks[0]), int(rows[0])
            if tried >= self.order.enough_substitutes:
                return

    def positions_of(self, chunks: Int64s, rows: Int64s, *, epoch: int) -> Standings:
        """Where samples stand in an epoch, those included where they stand in for excluded ones.

        An excluded sample stands nowhere. Costs a few blocks a sample.
        """
        own = self.order.positions_of(chunks, rows, epoch=epoch)
        left = np.flatnonzero(~self.is_excluded(self.sample_numbers(np.asarray(chunks), np.asarray(rows))))
        which, positions, stands_in = [], [], []
        keys = np.stack(self.order.blocks_of(own[left]), axis=1).tolist()
        for i, (*key, index) in zip(left.tolist(), keys, strict=True):
            block = Block(*key)
            fill = self._fill(block)
            assert fill is not None, "a block with this sample left"
            filled_by = fill
            while True:  # its own block, then those before it that have none left and lean on it
                places = self.order.block_positions(block)
                found = places[filled_by[np.arange(len(places)) % len(filled_by)] == index]
                which += [i] * len(found)
                positions += found.tolist()
                stands_in += (found != own[i]).tolist()
                block = self.order.next_block(block, step=-1)
                if self._fill(block) is not None:
                    break
                filled_by = fill
        order = np.lexsort((positions, which)) if which else np.zeros(0, np.int64)
        return Standings(
            np.array(which, np.int64)[order],
            np.array(positions, np.int64)[order],
            np.array(stands_in, bool)[order],
        )

    def _first_with_any_left(self, block: Block) -> tuple[Block, Int64s]:
        while (fill := self._fill(block)) is None:
            block = self.order.next_block(block)
        return block, fill

    def _fill(self, block: Block) -> Int64s | None:
        """int64[samples of the block]: whose place in the block each place's sample is; None: none is left."""

        def make() -> Int64s | None:
            places = self.order.block_positions(block)
            left = np.flatnonzero(~self.is_excluded(self.sample_numbers(*self.order.locate(places))))
            if not len(left):
                return None
            following = np.searchsorted(left, np.arange(len(places)))
            return left[following % len(left)]

        return self._fills.get_or_make((block.epoch, block.lane, block.number), make)
