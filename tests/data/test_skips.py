"""Skipped intervals: the stream with them is the plain stream with those positions left out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import PAD, Order, slice_batch
from pretrain.data.skips import Skips
from pretrain.data.stream import Segment, Source, Stream

LANES = 8
SIZES = np.random.default_rng(0).integers(1, 9, 90)
FAR = 800  # positions that are looked at


@st.composite
def intervals(draw: st.DrawFn, unit: int = LANES) -> list[tuple[int, int]]:
    """Up to six, in units of the lanes; some touch each other, some start at 0."""
    edges = sorted(draw(st.sets(st.integers(0, 70), min_size=0, max_size=7)))
    kept = draw(st.lists(st.booleans(), min_size=len(edges), max_size=len(edges)))
    pairs = zip(edges, edges[1:], kept, strict=False)
    return [(start * unit, stop * unit) for start, stop, keep in pairs if keep]


def left_over(skipped: list[tuple[int, int]], count: int = FAR) -> np.ndarray:
    """The positions that are consumed, by looking at each."""
    return np.array([g for g in range(count) if not any(a <= g < b for a, b in skipped)], np.int64)


@given(skipped=intervals(unit=1))
def test_consumed_and_position_of_are_each_others_inverse_and_count_what_is_left(
    skipped: list[tuple[int, int]],
) -> None:
    skips, left = Skips(skipped), left_over(skipped, 200)
    assert np.array_equal(np.flatnonzero(~skips.is_skipped(np.arange(200))), left)
    assert np.array_equal(skips.position_of(np.arange(len(left))), left)
    assert np.array_equal(skips.consumed(left), np.arange(len(left)))
    assert skips.consumed(np.arange(200)).tolist() == [int((left < g).sum()) for g in range(200)]


def plain() -> Stream:
    """Two segments, the second a mixture."""
    first = Segment([Source(dataset=0, chunk_samples=SIZES)], seed=3, lanes=LANES, block_chunks=2)
    both = [
        Source(dataset=0, chunk_samples=SIZES),
        Source(dataset=1, chunk_samples=SIZES[:20], weight=0.5),
    ]
    return Stream([first, Segment(both, seed=3, lanes=LANES, start=320, number=1, block_chunks=2)])


@settings(max_examples=25, deadline=None)
@given(
    skipped=intervals(),
    batch=st.sampled_from([LANES, 2 * LANES, 6 * LANES]),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_the_ranks_of_a_stream_with_skips_get_the_plain_stream_without_those_positions(
    skipped: list[tuple[int, int]], batch: int, ranks: list[int]
) -> None:
    """Resumed at every step, on another number of ranks each time."""
    stream = plain().skipping(skipped)
    left = left_over(skipped)
    g = 0
    for step in range(len(left) // batch):
        world_size = ranks[step % len(ranks)]
        whole = stream.batch(g, batch)
        slices = [slice_batch(whole, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(own) for own in slices}) == 1, "ranks differ in the number of their places"
        together = np.concatenate(slices)
        assert np.array_equal(together[together != PAD], whole)
        wanted = left[step * batch : (step + 1) * batch]
        assert np.array_equal(np.sort(whole), wanted)
        for got, expected in zip(stream.locate(wanted), plain().locate(wanted), strict=True):
            assert np.array_equal(got, expected), "a sample moved to another position"
        pairs = whole.reshape(-1, 2) % LANES
        assert np.all(np.abs(pairs[:, 0] - pairs[:, 1]) == LANES // 2), "pairs come from far lanes"
        g = stream.after(g, batch)
        assert g == wanted[-1] + 1
        assert int(stream.skips.consumed(g)) == (step + 1) * batch


@given(steps=st.sets(st.integers(0, 20), max_size=6), batch=st.sampled_from([LANES, 3 * LANES]))
@settings(max_examples=30, deadline=None)
def test_where_whole_batches_are_skipped_the_others_are_the_very_batches_of_the_plain_stream(
    steps: set[int], batch: int
) -> None:
    stream = plain().skipping([(k * batch, (k + 1) * batch) for k in steps])
    g = 0
    for k in (k for k in range(24) if k not in steps):
        assert np.array_equal(stream.batch(g, batch), plain().batch(k * batch, batch))
        g = stream.after(g, batch)


def test_nothing_skipped_is_the_stream_as_it_was() -> None:
    order = Order(chunk_samples=SIZES, seed=1, lanes=LANES)
    stream = Stream(order)
    for k in range(12):
        assert np.array_equal(stream.batch(k * 16, 16), order.batch(k * 16, 16))
        assert stream.after(k * 16, 16) == (k + 1) * 16
    assert not stream.skips


def test_intervals_that_cut_a_pair_or_overlap_are_refused() -> None:
    with pytest.raises(AssertionError, match="lanes"):
        plain().skipping([(4, 16)])
    with pytest.raises(AssertionError, match="overlap"):
        Skips([(0, 16), (8, 24)])
