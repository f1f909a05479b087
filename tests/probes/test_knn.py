"""Weighted nearest neighbours against a loop that does it by hand."""

import math

import pytest
import torch

from pretrain.errors import DataError
from pretrain.probes.knn import knn_predict, knn_top1


def data(count, seed, classes=4, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, 8, generator=generator), labels


def by_hand(train, labels, queries, neighbours, temperature):
    predicted = []
    for query in queries.tolist():
        scored = []
        for row, label in zip(train.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            lengths = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in row))
            scored.append((dot / lengths, label))
        votes = {}
        for cosine, label in sorted(scored, reverse=True)[:neighbours]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        predicted.append(max(votes, key=votes.get))
    return predicted


@pytest.mark.parametrize(("neighbours", "temperature"), [(20, 0.07), (1, 0.07), (5, 1.0), (7, 0.3)])
def test_predictions_equal_the_loop_by_hand(neighbours, temperature):
    train, labels = data(150, 1)
    queries, _ = data(60, 2)
    got = knn_predict(train, labels, queries, num_neighbours=neighbours, temperature=temperature)
    assert got.tolist() == by_hand(train, labels, queries, neighbours, temperature)


def test_more_neighbours_than_training_samples_means_all_of_them_vote():
    train, labels = data(6, 1)
    queries, _ = data(30, 2)
    got = knn_predict(train, labels, queries, num_neighbours=20)
    assert got.tolist() == by_hand(train, labels, queries, 6, 0.07)


def test_chunks_do_not_change_predictions():
    train, labels = data(150, 1)
    queries, _ = data(60, 2)
    wanted = knn_predict(train, labels, queries)
    for chunk_elements in (150 * 7, 150 * 60, 1):
        assert torch.equal(knn_predict(train, labels, queries, chunk_elements=chunk_elements), wanted)


def test_lengths_of_features_do_not_matter():
    train, labels = data(150, 1)
    queries, _ = data(60, 2)
    stretched = train * torch.rand(150, 1, generator=torch.Generator().manual_seed(3)).add(0.1)
    assert torch.equal(knn_predict(stretched, labels, queries * 50), knn_predict(train, labels, queries))


def test_top1_is_the_fraction_of_right_predictions():
    train, labels = data(150, 1)
    queries, truth = data(60, 2)
    wanted = sum(
        p == t for p, t in zip(by_hand(train, labels, queries, 20, 0.07), truth.tolist(), strict=True)
    )
    assert knn_top1(train, labels, queries, truth) == wanted / 60
    assert 0.3 < wanted / 60 < 1.0  # neither chance nor certainty: the comparison says something


def test_a_class_that_training_never_saw_is_wrong_and_not_an_error():
    train, labels = data(50, 1)
    queries, truth = data(10, 2)
    assert knn_top1(train, labels, queries, torch.full_like(truth, 9)) == 0.0


def test_training_samples_without_labels_are_refused():
    train, labels = data(10, 1)
    with pytest.raises(DataError, match="training data: 10 of 10"):
        knn_top1(train, labels * 0 - 1, train, labels)
