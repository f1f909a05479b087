"""The order promise: what stands at a position is a pure function of dataset, seed and position."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import PAD, Block, Order, lanes_for, permutation, slice_batch, validation_slice
from pretrain.errors import UsageError

WORLD_SIZES = (1, 2, 3, 4, 6, 7, 8)


def make_chunks(count: int, largest: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, largest + 1, count)


def sample_numbers(order: Order, positions: np.ndarray) -> np.ndarray:
    """Global sample number at each position, written apart from the code under test."""
    chunks, rows = order.locate(positions)
    starts = np.concatenate([[0], np.cumsum(order.chunk_samples)[:-1]])
    assert (rows >= 0).all()
    assert (rows < order.chunk_samples[chunks]).all()
    return starts[chunks] + rows


LANE_MODE = Order(chunk_samples=make_chunks(700, 16), seed=11, lanes=16, block_chunks=2)
SMALL_DATA = Order(chunk_samples=make_chunks(300, 16), seed=11, lanes=768 // 4, block_chunks=4)
BOTH_MODES = pytest.mark.parametrize("order", [LANE_MODE, SMALL_DATA], ids=["lanes", "small"])


def test_the_two_orders_of_these_tests_are_in_the_two_modes() -> None:
    assert not LANE_MODE.small
    assert SMALL_DATA.small
    assert len(set(LANE_MODE.chunk_samples.tolist())) > 5
    assert all(order.num_samples % 768 for order in (LANE_MODE, SMALL_DATA))


@BOTH_MODES
def test_over_three_epochs_every_sample_comes_exactly_once_an_epoch(order: Order) -> None:
    batches = -(-3 * order.num_samples // 768)
    positions = np.concatenate([order.batch(k * 768, 768) for k in range(batches)])
    assert sorted(positions.tolist()) == list(range(batches * 768))
    samples = sample_numbers(order, positions)
    epochs = positions // order.num_samples
    for epoch in range(3):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(order.num_samples))


@BOTH_MODES
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_slices_of_a_batch_of_768_unite_to_the_same_batch_for_any_world_size(
    order: Order, world_size: int
) -> None:
    for k in (0, 1, order.num_samples // 768, 7):
        batch = order.batch(k * 768, 768)
        slices = [slice_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(part) for part in slices} == {2 * -(-384 // world_size)}
        assert np.array_equal(np.concatenate([part[part != PAD] for part in slices]), batch)
        pads = [int((part == PAD).sum()) for part in slices]
        assert set(pads) <= {0, 2}
        assert all((part[len(part) - pad :] == PAD).all() for part, pad in zip(slices, pads, strict=True))


@BOTH_MODES
@pytest.mark.parametrize(("before", "after"), [(4, 3), (1, 8), (7, 2)])
def test_a_run_resumed_on_other_ranks_sees_the_samples_that_the_uninterrupted_one_would_have_seen(
    order: Order, before: int, after: int
) -> None:
    def seen(seed_order: Order, first: int, last: int, world_size: int) -> list[list[int]]:
        steps = []
        for k in range(first, last):
            batch = seed_order.batch(k * 768, 768)
            parts = [slice_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
            whole = np.concatenate([part[part != PAD] for part in parts])
            steps.append(sample_numbers(seed_order, whole).tolist())
        return steps

    resumed = Order(
        chunk_samples=order.chunk_samples,
        seed=order.seed,
        lanes=order.lanes,
        block_chunks=order.block_chunks,
    )
    stop = order.num_samples // 768 // 2 + 1
    assert seen(order, 0, stop + 9, before) == seen(order, 0, stop, before) + seen(
        resumed, stop, stop + 9, after
    )


@BOTH_MODES
def test_random_access_gives_what_reading_in_sequence_gives(order: Order) -> None:
    positions = np.arange(2 * order.num_samples + 50)
    in_sequence = sample_numbers(order, positions)
    shuffled = np.random.default_rng(1).permutation(len(positions))
    fresh = pickle.loads(pickle.dumps(order))
    assert np.array_equal(sample_numbers(fresh, positions[shuffled]), in_sequence[shuffled])
    for position in (0, 5, order.num_samples - 1, order.num_samples, 2 * order.num_samples + 7):
        assert sample_numbers(fresh, np.array([position]))[0] == in_sequence[position]


@BOTH_MODES
def test_a_batch_across_an_epoch_boundary_takes_the_end_of_one_and_the_start_of_the_next(
    order: Order,
) -> None:
    k = order.num_samples // 768
    batch = order.batch(k * 768, 768)
    assert set(order.epoch(batch).tolist()) == {0, 1}
    samples = sample_numbers(order, batch)
    left = np.setdiff1d(
        np.arange(order.num_samples), sample_numbers(order, np.arange(k * 768)), assume_unique=True
    )
    assert np.array_equal(np.sort(samples[order.epoch(batch) == 0]), left)


def test_a_pickled_order_leaves_its_tables_behind() -> None:
    order = Order(chunk_samples=make_chunks(20_000, 9), seed=2, lanes=8)
    fresh = len(pickle.dumps(order))
    order.locate(np.arange(100_000))
    assert len(pickle.dumps(order)) == fresh


@settings(max_examples=60, deadline=None)
@given(
    chunk_samples=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    seed=st.integers(0, 2**63 - 1),
    half_lanes=st.integers(1, 6),
    block_chunks=st.integers(1, 4),
    epoch=st.integers(0, 5),
)
def test_every_epoch_of_any_dataset_is_a_permutation(
    chunk_samples: list[int], seed: int, half_lanes: int, block_chunks: int, epoch: int
) -> None:
    order = Order(
        chunk_samples=np.array(chunk_samples), seed=seed, lanes=2 * half_lanes, block_chunks=block_chunks
    )
    positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    assert np.array_equal(np.sort(sample_numbers(order, positions)), np.arange(order.num_samples))


@settings(max_examples=60, deadline=None)
@given(
    chunk_samples=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    half_batch=st.integers(1, 40),
    world_size=st.integers(1, 9),
    step=st.integers(0, 20),
)
def test_slices_unite_to_the_batch_for_any_sizes(
    chunk_samples: list[int], half_batch: int, world_size: int, step: int
) -> None:
    B = 2 * half_batch
    order = Order(chunk_samples=np.array(chunk_samples), seed=3, lanes=lanes_for(B), block_chunks=1)
    batch = order.batch(step * B, B)
    slices = [slice_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(part) for part in slices}) == 1
    whole = np.concatenate(slices)
    assert whole[whole != PAD].tolist() == batch.tolist()
    assert sorted(batch.tolist()) == list(range(step * B, (step + 1) * B))
    real = [int((part != PAD).sum()) for part in slices]
    assert max(real) - min(real) <= 2
    assert all(size % 2 == 0 for size in real)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8, 9, 63])
@pytest.mark.parametrize("single_chunk", [True, False], ids=["one_chunk", "chunks_of_one"])
def test_datasets_around_the_batch_size_are_gone_through_in_whole_epochs(
    num_samples: int, single_chunk: bool
) -> None:
    B = 8
    sizes = np.array([num_samples]) if single_chunk else np.ones(num_samples, int)
    order = Order(chunk_samples=sizes, seed=0, lanes=lanes_for(B))
    positions = np.concatenate([order.batch(k * B, B) for k in range(num_samples)])  # B whole epochs
    counts = np.bincount(sample_numbers(order, positions), minlength=num_samples)
    assert (counts == B).all()


def test_empty_chunks_are_never_asked_for() -> None:
    order = Order(chunk_samples=np.array([0, 3, 0, 0, 9, 40, 0]), seed=5, lanes=2, block_chunks=1)
    assert not order.small
    chunks, _ = order.locate(np.arange(2 * 52))
    assert np.bincount(chunks, minlength=7).tolist() == [0, 6, 0, 0, 18, 80, 0]


def test_neighbours_in_a_batch_come_from_lanes_half_the_lanes_apart() -> None:
    for k in (0, 3, 5):
        lanes = LANE_MODE.batch(k * 96, 96) % LANE_MODE.lanes
        assert set(np.abs(lanes[0::2] - lanes[1::2]).tolist()) == {LANE_MODE.lanes // 2}


def test_a_slice_asks_for_few_lanes() -> None:
    batch = LANE_MODE.batch(0, 128)
    for rank in range(4):
        lanes = set((slice_batch(batch, rank=rank, world_size=4) % LANE_MODE.lanes).tolist())
        assert len(lanes) == LANE_MODE.lanes // 4


def test_staggered_lanes_open_new_chunks_at_an_even_rate() -> None:
    def peak_over_mean(order: Order) -> float:
        L = order.lanes
        positions = np.arange(order.num_samples // L * L)
        chunks, _ = order.locate(positions)
        lanes_and_chunks = (positions % L) * len(order.chunk_samples) + chunks
        _, first = np.unique(lanes_and_chunks, return_index=True)
        opened = np.bincount(first // L, minlength=len(positions) // L)
        # All lanes open their first chunks with the epoch, and run dry with it.
        steady = opened[order.block_rows : -order.block_rows]
        return float(steady.max() / steady.mean())

    class Unstaggered(Order):
        def _stagger(self, lanes: np.ndarray | int) -> np.ndarray | int:
            return lanes * 0

    # Chunk edges fall together with block edges here, the worst case for lanes that march in step.
    made = {"chunk_samples": np.full(64 * 40, 32), "seed": 4, "lanes": 64, "block_chunks": 4}
    assert peak_over_mean(Unstaggered(**made)) > 20  # type: ignore[arg-type]
    assert peak_over_mean(Order(**made)) < 5  # type: ignore[arg-type]


def test_samples_of_a_lane_stay_within_a_block_of_a_few_chunks() -> None:
    order = LANE_MODE
    chunks, _ = order.locate(np.arange(order.num_samples))
    place_of_chunk = np.empty(len(order.chunk_samples), int)
    place_of_chunk[order._epoch_table(0).shuffled] = np.arange(len(order.chunk_samples))
    starts = np.cumsum(order.chunk_samples[order._epoch_table(0).shuffled])
    for lane in (0, 7, 15):
        virtual = starts[place_of_chunk[chunks[lane :: order.lanes]]]
        rows = np.arange(len(virtual)) + order.num_samples * lane // order.lanes
        assert np.abs(virtual - rows).max() <= order.block_rows + 2 * order.chunk_samples.max()


def test_seeds_and_epochs_give_different_orders() -> None:
    for small in (True, False):
        sizes = make_chunks(30 if small else 700, 16)
        first, other = (Order(chunk_samples=sizes, seed=s, lanes=16, block_chunks=2) for s in (0, 1))
        positions = np.arange(first.num_samples)
        assert first.small == small
        a, b = sample_numbers(first, positions), sample_numbers(other, positions)
        c = sample_numbers(first, positions + first.num_samples)
        for one, two in ((a, b), (a, c), (b, c)):
            assert (one == two).mean() < 0.05


def test_the_order_is_the_one_that_was_released() -> None:
    """Golden digests: a change here changes what every stored run resumes into; raise ORDER_VERSION."""

    def digest(*arrays: np.ndarray) -> str:
        return hashlib.sha256(b"".join(np.ascontiguousarray(a, "<i8").tobytes() for a in arrays)).hexdigest()

    sizes = np.arange(1, 301) % 13 + 1
    lanes = Order(chunk_samples=sizes, seed=20_240_229, lanes=16, block_chunks=4)
    small = Order(chunk_samples=sizes, seed=20_240_229, lanes=256, block_chunks=4)
    assert not lanes.small
    assert small.small
    positions = np.arange(3 * lanes.num_samples)
    got = [
        digest(permutation(key=(1, 2), counter=(0, 3, 4, 5), size=1000)),
        digest(*lanes.locate(positions)),
        digest(*small.locate(positions)),
        digest(*(lanes.batch(k * 96, 96) for k in range(100))),
        digest(slice_batch(lanes.batch(96, 96), rank=3, world_size=7)),
    ]
    assert got == GOLDEN


GOLDEN = [
    "5811cf1247f6d01a2a1d7a1fe47c4902bf323e12000bc9e16d661bdd32fa1627",
    "c538af43356756bd0dcec80dbd72dbdca79d0d10f4df2c64d243e433259f5bf2",
    "a231341cbb109d5aae1d966ea831ea145ec9be2c1b7e40106bd1edcbde12a7d0",
    "f0e3723a431e99fece5b91ef21b59d60fef878aa953ec477af9ebe5eeb99496c",
    "f1aa67b6194bc7b8f69aa907c232d06282336034da57da4f7e22604e97afc20c",
]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**40)))
def test_a_permutation_holds_every_number_once(size: int, key: tuple[int, int]) -> None:
    assert np.array_equal(np.sort(permutation(key=key, counter=(0, 0, 0, 0), size=size)), np.arange(size))


def test_a_permutation_favours_no_place() -> None:
    counts = np.zeros((8, 8), int)
    for trial in range(4000):
        counts[np.arange(8), permutation(key=(trial, 0), counter=(0, 1, 0, 0), size=8)] += 1
    chi_square = float(((counts - 500) ** 2 / 500).sum())  # 49 degrees of freedom; 99.99 % below 96
    assert chi_square < 96


def test_lanes_are_the_largest_even_divisor_of_the_batch_up_to_256() -> None:
    wanted = {2: 2, 6: 6, 62: 62, 254: 254, 256: 256, 514: 2, 768: 256, 1000: 250, 1024: 256, 4096: 256}
    assert {B: lanes_for(B) for B in wanted} == wanted
    for B in range(2, 1200, 2):
        assert lanes_for(B) == max(d for d in range(2, 257, 2) if B % d == 0)
    for B in (0, 1, 7, 255, -2):
        with pytest.raises(UsageError, match="even"):
            lanes_for(B)


@pytest.mark.parametrize("num_samples", [0, 1, 5, 64, 65])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_validation_slices_cover_the_data_once_and_are_equally_long(
    num_samples: int, world_size: int
) -> None:
    slices = [validation_slice(num_samples, rank=r, world_size=world_size) for r in range(world_size)]
    assert {len(part) for part in slices} == {-(-num_samples // world_size)}
    whole = np.concatenate(slices)
    assert whole[whole != PAD].tolist() == list(range(num_samples))
    real = [int((part != PAD).sum()) for part in slices]
    assert max(real) - min(real) <= 1


@pytest.mark.parametrize("order", [LANE_MODE, SMALL_DATA], ids=["lanes", "small"])
def test_a_positions_substitutes_are_the_rest_of_its_block_and_start_with_the_next_sample(
    order: Order,
) -> None:
    N = order.num_samples
    for position in (0, 5, 777, N - 1, N, 2 * N + 77):
        epoch, lane, number, index = (int(value[0]) for value in order.blocks_of([position]))
        block = order.block_positions(Block(epoch, lane, number)).tolist()
        assert block[index] == position
        rest = block[index + 1 :] + block[:index]
        others = list(order.substitutes(position))
        chunks, rows = order.locate(rest)
        assert others[: len(rest)] == list(zip(chunks.tolist(), rows.tolist(), strict=True))
        own = tuple(int(value[0]) for value in order.locate([position]))
        assert len({*others, own}) == len(others) + 1, "each once, and not the sample itself"


def test_a_short_block_at_a_lanes_end_has_substitutes_all_the_same() -> None:
    short = 0
    for position in range(2 * LANE_MODE.num_samples):
        epoch, lane, number, _ = (int(value[0]) for value in LANE_MODE.blocks_of([position]))
        size = len(LANE_MODE.block_positions(Block(epoch, lane, number)))
        if size <= LANE_MODE.block_rows // 2:
            short += 1
            assert len(list(LANE_MODE.substitutes(position))) >= LANE_MODE.block_rows // 2
        elif position % 50 == 0:
            assert len(list(LANE_MODE.substitutes(position))) == size - 1
    assert short > 50
