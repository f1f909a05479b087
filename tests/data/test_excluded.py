"""Excluded samples: none is shown, every position is filled by rule, and the audit's inverse agrees."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.excluded import ExcludingOrder
from pretrain.data.order import Block, Order


def sample_numbers(order: Order, chunks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(order.chunk_samples)[:-1]])
    return starts[chunks] + rows


def by_the_rule(order: Order, excluded: set[int], position: int) -> int:
    """The sample that is to stand at `position`, found by walking; written apart from the code under test."""
    N, L = order.num_samples, order.lanes
    epoch, offset = divmod(position, N)

    def sample_at(place: int) -> int:
        chunks, rows = order.locate([epoch * N + place])
        return int(sample_numbers(order, chunks, rows)[0])

    if order.small:
        return next(s for i in range(N) if (s := sample_at((offset + i) % N)) not in excluded)
    lane_rows = [len(range(lane, N, L)) for lane in range(L)]
    blocks = []  # (lane, first row, end), in the order in which they fill in for each other
    for lane in range(L):
        edge = order.block_rows - lane * order.block_rows // L
        start = 0
        while start < lane_rows[lane]:
            blocks.append((lane, start, min(edge, lane_rows[lane])))
            start, edge = edge, edge + order.block_rows
    row, lane = divmod(offset, L)
    at = next(i for i, (b, start, end) in enumerate(blocks) if b == lane and start <= row < end)
    index = row - blocks[at][1]
    for further in range(len(blocks)):
        block_lane, start, end = blocks[(at + further) % len(blocks)]
        size = end - start
        samples = [sample_at((start + (index % size + i) % size) * L + block_lane) for i in range(size)]
        left = [sample for sample in samples if sample not in excluded]
        if left:
            return left[0]
    raise AssertionError("nothing is left")


orders = st.builds(
    lambda sizes, lanes, block_chunks, seed, series: Order(
        chunk_samples=np.array(sizes), lanes=lanes, block_chunks=block_chunks, seed=seed, series=series
    ),
    st.lists(st.integers(1, 6), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(0, 2**63),
    st.sampled_from([0, 1, 1 << 20]),
)


@settings(max_examples=80, deadline=None)
@given(order=orders, data=st.data(), epoch=st.integers(0, 3))
def test_every_position_shows_what_the_rule_says_and_never_an_excluded_sample(
    order: Order, data: st.DataObject, epoch: int
) -> None:
    N = order.num_samples
    kept = data.draw(st.integers(1, N))
    excluded = np.sort(np.random.default_rng(N).permutation(N)[kept:])
    without = ExcludingOrder(order, excluded)
    positions = epoch * N + np.arange(N)
    standing = sample_numbers(order, *without.locate(positions))
    assert not np.isin(standing, excluded).any()
    own = sample_numbers(order, *order.locate(positions))
    assert np.array_equal(standing[~np.isin(own, excluded)], own[~np.isin(own, excluded)])
    banned = set(excluded.tolist())
    for position in data.draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=8)):
        assert standing[position] == by_the_rule(order, banned, epoch * N + position)


@settings(max_examples=60, deadline=None)
@given(order=orders, data=st.data(), epoch=st.integers(0, 3))
def test_the_inverse_names_every_position_at_which_a_sample_stands(
    order: Order, data: st.DataObject, epoch: int
) -> None:
    N = order.num_samples
    kept = data.draw(st.integers(1, N))
    excluded = np.sort(np.random.default_rng(N + 1).permutation(N)[kept:])
    without = ExcludingOrder(order, excluded)
    positions = epoch * N + np.arange(N)
    standing = sample_numbers(order, *without.locate(positions))
    ends = np.cumsum(order.chunk_samples)
    samples = np.array(data.draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=10, unique=True)))
    chunks = np.searchsorted(ends, samples, side="right")
    rows = samples - np.where(chunks > 0, ends[chunks - 1], 0)
    own = order.positions_of(chunks, rows, epoch=epoch)
    assert np.array_equal(sample_numbers(order, *order.locate(own)), samples)
    found = without.positions_of(chunks, rows, epoch=epoch)
    for i, sample in enumerate(samples.tolist()):
        here = found.which == i
        assert found.positions[here].tolist() == positions[standing == sample].tolist()
        assert np.array_equal(found.stands_in[here], found.positions[here] != own[i])


@settings(max_examples=40, deadline=None)
@given(order=orders, data=st.data())
def test_substitutes_go_on_from_what_stands_there_and_pass_over_what_is_excluded(
    order: Order, data: st.DataObject
) -> None:
    N = order.num_samples
    kept = data.draw(st.integers(1, N))
    excluded = np.sort(np.random.default_rng(N + 2).permutation(N)[kept:])
    without = ExcludingOrder(order, excluded)
    position = data.draw(st.integers(0, 3 * N))
    chunks, rows = without.locate([position])
    standing = (int(chunks[0]), int(rows[0]))
    # What stands there has a position of its own, from which the walk goes on, block after block.
    standing_at = int(without.stand_ins(np.array([position]))[0])
    epoch, lane, number, index = (int(column[0]) for column in order.blocks_of([standing_at]))
    own = block = Block(epoch, lane, number)
    places = order.block_positions(own).tolist()
    places = places[index + 1 :] + places[:index]
    expected: list[tuple[int, int]] = []
    while True:
        chunks, rows = order.locate(places)
        left = ~np.isin(sample_numbers(order, chunks, rows), excluded)
        expected += zip(chunks[left].tolist(), rows[left].tolist(), strict=True)
        block = order.next_block(block)
        if len(expected) >= order.block_rows // 2 or block == own:
            break
        places = order.block_positions(block).tolist()
    got = list(without.substitutes(position))
    assert got == expected
    assert standing not in got
    assert len(got) >= min(order.block_rows // 2, N - len(excluded) - 1)
    # Those of before, when excluded ones counted as tried, still come first: what was replaced stays replaced.
    former = [place for place in order.substitutes(standing_at) if place in got]
    assert got[: len(former)] == former


def test_the_last_sample_left_in_its_block_has_substitutes_in_the_next() -> None:
    order = Order(chunk_samples=np.full(60, 4), seed=9, lanes=4, block_chunks=2)
    own = Block(0, 1, 2)
    block = order.block_positions(own)
    last = int(block[3])
    without = ExcludingOrder(
        order, np.sort(sample_numbers(order, *order.locate(np.setdiff1d(block, [last]))))
    )
    following = order.block_positions(order.next_block(own))
    chunks, rows = order.locate(following)
    expected = list(zip(chunks.tolist(), rows.tolist(), strict=True))
    for position in (last, int(block[0])):  # where it stands, and where it stands in
        assert list(without.substitutes(position)) == expected


def test_a_block_with_nothing_left_is_filled_by_the_next_of_its_lane() -> None:
    order = Order(chunk_samples=np.full(60, 4), seed=9, lanes=4, block_chunks=2)
    assert not order.small
    N = order.num_samples
    for lane in range(4):
        rows = N // 4
        second = order.block_rows - lane * order.block_rows // 4  # first row of the lane's second block
        block = (np.arange(second, second + order.block_rows) * 4 + lane).astype(np.int64)
        excluded = np.sort(sample_numbers(order, *order.locate(block)))
        without = ExcludingOrder(order, excluded)
        filled = sample_numbers(order, *without.locate(block))
        expected = sample_numbers(order, *order.locate(block + 4 * order.block_rows))
        assert np.array_equal(filled, expected)
        assert rows > second + 2 * order.block_rows


def test_a_pickled_one_leaves_its_tables_behind_and_goes_on_alike() -> None:
    order = Order(chunk_samples=np.full(4000, 5), seed=9, lanes=8)
    without = ExcludingOrder(order, np.arange(0, 20_000, 3))
    fresh = len(pickle.dumps(without))
    located = without.locate(np.arange(9000))
    assert len(pickle.dumps(without)) == fresh
    again = pickle.loads(pickle.dumps(without)).locate(np.arange(9000))
    assert all(np.array_equal(a, b) for a, b in zip(located, again, strict=True))


@pytest.mark.parametrize(("lanes", "golden"), [(16, "LANES"), (256, "SMALL")])
def test_the_filling_is_the_one_that_was_released(lanes: int, golden: str) -> None:
    """A change here changes what stored runs resume into."""
    order = Order(chunk_samples=np.arange(1, 301) % 13 + 1, seed=20_240_229, lanes=lanes)
    without = ExcludingOrder(order, np.flatnonzero(np.arange(order.num_samples) % 7 < 3))
    located = without.locate(np.arange(2 * order.num_samples))
    digest = hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in located)).hexdigest()
    assert digest == GOLDEN[golden]


GOLDEN = {
    "LANES": "67648a786eb56ca85a2e053310623c29c65e95cf822e1162603617c6de3d6309",
    "SMALL": "e75bb156d8971a8e7eb7edbaaa113e833cc4eb369931cd0b71dfa81551a9d9ae",
}
