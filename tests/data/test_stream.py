"""Mixtures and segments: a run's positions over several datasets, and over changes of them."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import PAD, Int64s, Order, lanes_for, slice_batch
from pretrain.data.stream import Segment, Source, Stream, share_lanes
from pretrain.errors import UsageError


def sizes_of(count: int, largest: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, largest + 1, count)


DATASETS = [sizes_of(150, 9, 0), sizes_of(11, 9, 1), sizes_of(400, 5, 2)]
STARTS = [np.concatenate([[0], np.cumsum(sizes)[:-1]]) for sizes in DATASETS]
COUNTS = [int(sizes.sum()) for sizes in DATASETS]


def source(dataset: int, weight: float = 1.0, excluded: np.ndarray | None = None) -> Source:
    return Source(dataset=dataset, chunk_samples=DATASETS[dataset], weight=weight, excluded=excluded)


def samples_at(stream: Stream, positions: Int64s) -> list[tuple[int, int]]:
    """(dataset, sample number) at each position."""
    places = stream.locate(positions)
    return [
        (d, int(STARTS[d][chunk] + row))
        for d, chunk, row in zip(places.datasets.tolist(), places.chunks, places.rows, strict=True)
    ]


def three_segments() -> Stream:
    """One dataset; from 960 on a mixture of three; from 2400 on without two thirds of the first."""
    common = {"seed": 7, "lanes": 16, "block_chunks": 2}
    return Stream(
        [
            Segment([source(0)], **common),
            Segment([source(0, 2.0), source(1, 0.5), source(2, 1.0)], start=960, number=1, **common),
            Segment(
                [source(0, 2.0, np.flatnonzero(np.arange(COUNTS[0]) % 3 > 0)), source(2, 1.0)],
                start=2400,
                number=2,
                **common,
            ),
        ]
    )


def test_a_stream_over_one_order_is_that_order() -> None:
    for lanes in (16, 128):
        order = Order(chunk_samples=DATASETS[0], seed=3, lanes=lanes)
        stream = Stream(order)
        positions = np.arange(3 * COUNTS[0])
        places = stream.locate(positions)
        for got, wanted in zip(places[1:], order.locate(positions), strict=True):
            assert np.array_equal(got, wanted)
        assert not places.datasets.any()
        for k in (0, 1, COUNTS[0] // 128, 20):
            assert np.array_equal(stream.batch(k * 128, 128), order.batch(k * 128, 128))
        assert np.array_equal(stream.epoch(positions), order.epoch(positions))
        assert list(stream.substitutes(5)) == [(0, *place) for place in order.substitutes(5)]
        assert stream.fingerprint() == order.fingerprint()
        assert stream.epochs(2 * COUNTS[0]) == 2
        assert stream.samples_for(2.5) == 2.5 * COUNTS[0]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    half_lanes=st.integers(4, 128),
)
def test_lanes_are_shared_by_weight_to_within_one_and_everybody_gets_one(
    weights: list[float], half_lanes: int
) -> None:
    lanes = 2 * half_lanes
    shares = share_lanes(weights, lanes=lanes)
    assert sum(shares) == lanes
    assert min(shares) >= 1
    assert shares == share_lanes([weight * 4 for weight in weights], lanes=lanes)
    ordered = sorted(zip(weights, shares, strict=True))
    assert [share for _, share in ordered] == sorted(shares), "a heavier dataset never gets fewer lanes"
    quotas = [weight / sum(weights) * lanes for weight in weights]
    if min(quotas) >= 1:
        assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))


@pytest.mark.parametrize(
    ("weights", "lanes", "shares"),
    [
        ([1], 256, (256,)),
        ([1, 1], 256, (128, 128)),
        ([2, 1], 256, (171, 85)),
        ([1, 1, 1], 256, (86, 85, 85)),
        ([1, 10_000], 16, (1, 15)),
        ([1, 1, 1e6], 4, (1, 1, 2)),
        ([0.1, 0.2, 0.3], 6, (1, 2, 3)),
    ],
)
def test_some_shares_of_lanes(weights: list[float], lanes: int, shares: tuple[int, ...]) -> None:
    assert share_lanes(weights, lanes=lanes) == shares


def test_more_datasets_than_lanes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"5 datasets cannot share 4 lanes.*global_batch_size"):
        share_lanes([1] * 5, lanes=4)


mixtures = st.lists(
    st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.floats(0.05, 20)),
    min_size=2,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(
    mixture=mixtures,
    half_lanes=st.integers(2, 10),
    seed=st.integers(0, 2**63),
    block_chunks=st.integers(1, 3),
)
def test_every_row_of_lanes_holds_the_shares_and_each_dataset_comes_once_in_its_own_epoch(
    mixture: list[tuple[list[int], float]], half_lanes: int, seed: int, block_chunks: int
) -> None:
    sources = [
        Source(dataset=d, chunk_samples=np.array(sizes), weight=weight)
        for d, (sizes, weight) in enumerate(mixture)
    ]
    segment = Segment(sources, seed=seed, lanes=2 * half_lanes, block_chunks=block_chunks)
    stream = Stream([segment])
    L = stream.lanes
    counts = [sum(sizes) for sizes, _ in mixture]
    rows = max(math.ceil(2 * N / L_d) for N, L_d in zip(counts, segment.lanes_by_source, strict=True))
    places = stream.locate(np.arange(rows * L))
    epochs = stream.epoch(np.arange(rows * L))
    for row in range(0, rows, 3):
        shares = Counter(places.datasets[row * L : (row + 1) * L].tolist())
        assert tuple(shares[d] for d in range(len(mixture))) == segment.lanes_by_source
    for d, (sizes, _) in enumerate(mixture):
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        for epoch in (0, 1):
            here = (places.datasets == d) & (epochs == epoch)
            samples = starts[places.chunks[here]] + places.rows[here]
            assert np.array_equal(np.sort(samples), np.arange(counts[d]))
    progress = segment.epochs_by_source(rows * L)
    assert progress == [rows * L_d / N for N, L_d in zip(counts, segment.lanes_by_source, strict=True)]


def test_a_dataset_in_a_mixture_goes_by_an_order_of_its_own_lanes() -> None:
    segment = Segment([source(0, 1.0), source(2, 3.0)], seed=7, lanes=16, block_chunks=2)
    assert segment.lanes_by_source == (4, 12)
    places = segment.locate(np.arange(16 * 300))
    for i, dataset in enumerate((0, 2)):
        own = Order(chunk_samples=DATASETS[dataset], seed=7, lanes=(4, 12)[i], block_chunks=2, series=i)
        here = places.datasets == dataset
        chunks, rows = own.locate(np.arange(int(here.sum())))
        assert np.array_equal(places.chunks[here], chunks)
        assert np.array_equal(places.rows[here], rows)


def test_datasets_and_segments_of_one_size_are_not_shuffled_alike() -> None:
    same = [Source(dataset=d, chunk_samples=DATASETS[0]) for d in (0, 1)]
    common = {"seed": 1, "lanes": 16, "block_chunks": 2}
    stream = Stream([Segment(same, **common), Segment(same, start=16 * 100, number=1, **common)])
    places = stream.locate(np.arange(16 * 200))
    chunks = [
        places.chunks[half][places.datasets[half] == d]
        for half in (slice(0, 1600), slice(1600, 3200))
        for d in (0, 1)
    ]
    for i in range(4):
        for j in range(i):
            assert (chunks[i] == chunks[j]).mean() < 0.1


def test_pairs_of_a_mixture_mix_its_datasets_by_their_shares() -> None:
    segment = Segment([source(0, 3.0), source(2, 1.0)], seed=7, lanes=256, block_chunks=2)
    batch = Stream([segment]).batch(0, 1024)
    datasets = segment.locate(batch).datasets
    lanes = batch % 256
    assert (np.abs(lanes[0::2] - lanes[1::2]) == 128).all()
    mixed = float((datasets[0::2] != datasets[1::2]).mean())
    assert 0.25 < mixed < 0.5  # 2 · 3/4 · 1/4 = 0.375 of random pairs


@pytest.mark.parametrize("B", [16, 32, 96])
def test_batches_cover_each_position_once_also_where_a_segment_begins(B: int) -> None:
    stream = three_segments()
    for k in range(3200 // B):
        batch = stream.batch(k * B, B)
        assert sorted(batch.tolist()) == list(range(k * B, (k + 1) * B))
        segments = stream.segment_of(batch)
        assert np.array_equal(segments[0::2], segments[1::2]), "pairs stay within a segment"


WHOLE = samples_at(three_segments(), np.arange(4500))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_run_over_changes_sees_the_same_at_any_world_size_wherever_it_stopped(data: st.DataObject) -> None:
    position, reached = 0, 0
    while reached < 2600:  # attempts: so many ranks, so many steps, and perhaps back to an older checkpoint
        B = data.draw(st.sampled_from([size for size in (16, 64, 96, 240) if position % size == 0]))
        world_size = data.draw(st.integers(1, 9))
        stream = three_segments()
        steps = data.draw(st.integers(1, 1 + 1600 // B))
        for _ in range(steps):
            batch = stream.batch(position, B)
            parts = [slice_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
            seen = np.concatenate([part[part != PAD] for part in parts])
            assert sorted(seen.tolist()) == list(range(position, position + B))
            shares = seen[: len(parts[0])], seen[len(parts[0]) :]  # a loader asks for parts of a batch
            got = [sample for share in shares for sample in samples_at(stream, share)]
            assert got == [WHOLE[g] for g in seen.tolist()]
            position += B
        reached = max(reached, position)
        position -= B * data.draw(st.integers(0, steps))  # newer checkpoints were lost


def test_a_change_begins_new_epochs_and_excludes_from_there_on() -> None:
    stream = three_segments()
    positions = np.arange(2400, 2400 + 16 * 300)
    seen = samples_at(stream, positions)
    assert not any(dataset == 1 for dataset, _ in seen)
    assert not any(dataset == 0 and sample % 3 for dataset, sample in seen)
    kept = {(0, sample) for sample in range(0, COUNTS[0], 3)}
    first_epoch = stream.epoch(positions) == 0
    for dataset, expected in ((0, kept), (2, {(2, s) for s in range(COUNTS[2])})):
        here = [item for item, first in zip(seen, first_epoch, strict=True) if first and item[0] == dataset]
        assert set(here) == expected
        assert len(here) == COUNTS[dataset]
    before = samples_at(stream, np.arange(960))
    assert any(dataset == 0 and sample % 3 for dataset, sample in before)
    assert stream.epoch([959, 960, 2399, 2400]).tolist() == [959 // COUNTS[0], 0, stream.epoch([2399])[0], 0]


def test_epochs_add_up_over_segments_and_back() -> None:
    stream = three_segments()
    sums = [COUNTS[0], sum(COUNTS), COUNTS[0] + COUNTS[2]]
    expected = 960 / sums[0] + 1440 / sums[1] + 500 / sums[2]
    assert stream.epochs(2900) == pytest.approx(expected)
    for g in (0, 100, 960, 2000, 2400, 9999):
        assert stream.samples_for(stream.epochs(g)) == pytest.approx(g)


def test_a_segment_knows_where_its_sources_positions_are() -> None:
    for segment in three_segments().segments:
        positions = np.arange(1000)
        sources, own = segment.own_positions(positions)
        for i in range(len(segment.orders)):
            here = sources == i
            assert np.array_equal(own[here], np.arange(int(here.sum())))
            assert np.array_equal(segment.positions_of(i, own[here]), positions[here])


def test_a_change_right_after_a_change_leaves_the_first_without_positions() -> None:
    common = {"seed": 7, "lanes": 16, "block_chunks": 2}
    stream = Stream(
        [
            Segment([source(0)], **common),
            Segment([source(1)], start=160, number=1, **common),
            Segment([source(2)], start=160, number=2, **common),
        ]
    )
    assert {dataset for dataset, _ in samples_at(stream, np.arange(160))} == {0}
    assert {dataset for dataset, _ in samples_at(stream, np.arange(160, 480))} == {2}
    assert sorted(stream.batch(128, 96).tolist()) == list(range(128, 224))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 8])
def test_slices_of_a_mixtures_batch_unite_to_it(world_size: int) -> None:
    stream = three_segments()
    B = 96
    assert lanes_for(B) % 2 == 0
    for start in (864, 960, 1920, 2400 - 48):
        batch = stream.batch(start, B)
        parts = [slice_batch(batch, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert np.concatenate([part[part != PAD] for part in parts]).tolist() == batch.tolist()


def test_mixtures_and_segments_are_the_ones_that_were_released() -> None:
    """Golden digests: a change here changes what every stored run resumes into; raise ORDER_VERSION."""

    def digest(*arrays: np.ndarray) -> str:
        return hashlib.sha256(b"".join(np.ascontiguousarray(a, "<i8").tobytes() for a in arrays)).hexdigest()

    fixed = [np.arange(1, 301) % 13 + 1, np.arange(1, 41) % 7 + 1]
    common = {"seed": 20_240_229, "lanes": 32}
    mixture = [
        Source(dataset=0, chunk_samples=fixed[0], weight=2.5),
        Source(dataset=1, chunk_samples=fixed[1], weight=1.0, excluded=np.arange(0, 100, 3)),
    ]
    stream = Stream(
        [
            Segment([Source(dataset=0, chunk_samples=fixed[0])], **common),
            Segment(mixture, start=640, number=1, **common),
        ]
    )
    got = [
        digest(*stream.locate(np.arange(6000))),
        digest(*(stream.batch(k * 96, 96) for k in range(60))),
        digest(stream.epoch(np.arange(6000))),
    ]
    assert got == GOLDEN


GOLDEN = [
    "8a6e0ea38f51f3db79d6d655763d40f908fff126c4936d15ff4e13aa2ccfc15a",
    "4f16ae3cb0386aa2aeaf859a0023434e56189cceba161a385da35e4c07bb2dd6",
    "05e16fa01b478dedc84b6b7bacb02498be5b406ec78cd18d5a32aeca9bdfb696",
]
