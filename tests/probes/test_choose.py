"""Which samples a probe looks at: in proportion, of few chunks, the same every time."""

import numpy as np
import pytest

from pretrain.probes.choose import choose_samples


def shuffled(count=6000, classes=7, unlabelled=0.1, seed=0):
    random = np.random.default_rng(seed)
    weights = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = random.choice(classes, size=count, p=weights).astype(np.int32)
    labels[random.random(count) < unlabelled] = -1
    return labels


CHUNKS = np.full(150, 40)


@pytest.mark.parametrize("labels", [shuffled(), np.sort(shuffled())], ids=["shuffled", "sorted"])
def test_classes_get_places_in_proportion_and_the_unlabelled_none(labels):
    chosen = choose_samples(labels, CHUNKS, count=700)
    assert len(chosen) == len(set(chosen.tolist())) == 700
    assert (np.diff(chosen) > 0).all()
    of_all = np.bincount(labels[labels >= 0])
    exact = 700 * of_all / of_all.sum()
    assert (np.abs(np.bincount(labels[chosen]) - exact) < 1).all()


def test_few_whole_chunks_are_read_where_labels_are_shuffled():
    labels = shuffled()
    chunks = np.unique(choose_samples(labels, CHUNKS, count=700) // 40)
    assert len(chunks) < 40  # 20 hold as many; a uniform choice would touch all 150
    assert not (np.diff(chunks) == 1).all()


def test_the_choice_depends_on_the_seed_alone():
    labels = shuffled()
    first = choose_samples(labels, CHUNKS, count=100)
    assert first.tolist() == choose_samples(labels, CHUNKS, count=100, seed=0).tolist()
    assert first.tolist() != choose_samples(labels, CHUNKS, count=100, seed=1).tolist()


@pytest.mark.parametrize("count", [None, 10**6])
def test_without_a_limit_all_that_have_a_label_are_taken(count):
    labels = shuffled()
    assert choose_samples(labels, CHUNKS, count=count).tolist() == np.flatnonzero(labels >= 0).tolist()
