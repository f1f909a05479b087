"""A part of a dataset: as many of each class as it has, and an order that keeps every promise of the whole one's."""

import numpy as np
import pytest

from pretrain.data.order import Order, locate_sample, sample_ends
from pretrain.data.selected import SelectedOrder, choose_fraction
from pretrain.data.stream import Segment, Source, Stream

LABELS = np.repeat(np.arange(10), [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]).astype(np.int32)
CHUNKS = np.array([7, 3, 20, 1, 40, 9] * 25, np.int32)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_every_class_gives_its_share_and_the_same_seed_the_same_samples(fraction: float) -> None:
    labels = np.random.default_rng(0).permutation(LABELS)
    chosen = choose_fraction(labels, fraction, seed=3)
    assert len(chosen) == round(fraction * len(labels))
    counts = np.bincount(labels[chosen], minlength=10)
    assert np.abs(counts - fraction * np.bincount(labels)).max() < 1
    assert np.array_equal(chosen, choose_fraction(labels, fraction, seed=3))
    assert not np.array_equal(chosen, choose_fraction(labels, fraction, seed=4))


def test_a_smaller_fraction_is_a_part_of_a_larger_one_and_no_class_is_left_out() -> None:
    small, large = (set(choose_fraction(LABELS, fraction, seed=0)) for fraction in (0.1, 0.2))
    assert small < large
    tiny = choose_fraction(LABELS, 0.001, seed=0)
    assert sorted(LABELS[tiny]) == list(range(10))
    assert len(choose_fraction(LABELS, 1.0, seed=0)) == len(LABELS)


def test_data_without_labels_gives_any_samples_and_not_its_first() -> None:
    chosen = choose_fraction(np.full(1000, -1, np.int32), 0.2, seed=0)
    assert len(chosen) == 200
    assert chosen.min() < 100
    assert chosen.max() > 900


def numbers(order: Order | SelectedOrder, positions: np.ndarray) -> np.ndarray:
    chunks, rows = order.locate(positions)
    assert (rows < CHUNKS[chunks]).all()
    ends = sample_ends(CHUNKS)
    return np.where(chunks > 0, ends[chunks - 1], 0).astype(np.int64) + rows


@pytest.mark.parametrize("lanes", [4, 64])
def test_an_epoch_shows_each_chosen_sample_once_and_no_other(lanes: int) -> None:
    chosen = choose_fraction(np.zeros(int(CHUNKS.sum()), np.int32), 0.3, seed=1)
    order = SelectedOrder(chosen, chunk_samples=CHUNKS, seed=5, lanes=lanes)
    assert order.small == (lanes == 64)
    n = len(chosen)
    first, second = (numbers(order, np.arange(epoch * n, (epoch + 1) * n)) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), chosen)
    assert np.array_equal(np.sort(second), chosen)
    assert not np.array_equal(first, second)


def test_its_order_is_that_of_a_dataset_that_holds_the_chosen_samples_alone() -> None:
    total = int(CHUNKS.sum())
    chosen = np.flatnonzero(np.arange(total) % 3 == 0)
    chunks, _ = locate_sample(sample_ends(CHUNKS), chosen)
    alone = Order(chunk_samples=np.bincount(chunks)[np.unique(chunks)], seed=9, lanes=8)
    order = SelectedOrder(chosen, chunk_samples=CHUNKS, seed=9, lanes=8)
    positions = np.arange(3 * len(chosen))
    parts, rows = alone.locate(positions)
    starts = np.concatenate([[0], np.cumsum(alone.chunk_samples)])
    assert np.array_equal(numbers(order, positions), chosen[starts[parts] + rows])
    assert np.array_equal(order.batch(8, 16), alone.batch(8, 16))


def test_samples_are_found_where_they_stand_and_those_not_chosen_nowhere() -> None:
    chosen = np.flatnonzero(np.arange(int(CHUNKS.sum())) % 5 == 2)
    order = SelectedOrder(chosen, chunk_samples=CHUNKS, seed=2, lanes=4)
    asked = np.array([chosen[0], chosen[0] + 1, chosen[-1], chosen[40]])
    chunks, rows = locate_sample(sample_ends(CHUNKS), asked)
    found = order.positions_of(chunks, rows, epoch=1)
    assert found.which.tolist() == [0, 2, 3]
    assert numbers(order, found.positions).tolist() == asked[found.which].tolist()
    stand_ins = [*order.substitutes(int(found.positions[0]))]
    ends = sample_ends(CHUNKS)
    assert {int(ends[c]) - int(CHUNKS[c]) + r for c, r in stand_ins} <= set(chosen.tolist()) - {int(asked[0])}


def test_a_stream_says_which_part_it_is_of() -> None:
    def fingerprint(selected: np.ndarray | None) -> dict[str, object]:
        source = Source(dataset=0, chunk_samples=CHUNKS, selected=selected)
        stream = Stream([Segment([source], seed=1, lanes=8)])
        assert stream.samples_by_dataset == (int(CHUNKS.sum()),)
        return stream.fingerprint()

    whole = fingerprint(None)
    assert "selected" not in whole
    one, other = fingerprint(np.arange(100)), fingerprint(np.arange(1, 101))
    assert one["num_samples"] == other["num_samples"] == 100
    assert one["selected"] != other["selected"]
