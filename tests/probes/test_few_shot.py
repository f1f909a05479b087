"""Few-shot least squares against numpy's lstsq, and which images it learns from."""

import numpy as np
import pytest
import torch

from pretrain.errors import DataError
from pretrain.probes.few_shot import BIAS, L2, choose_shots, few_shot_top1, fit_least_squares


def data(count, seed, classes=4, width=6, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, width, generator=generator), labels


def scores_by_lstsq(features, labels, queries, classes, l2):
    """A ridge as an ordinary least-squares problem: rows of √λ I below the data."""
    x, q = features.double().numpy(), queries.double().numpy()
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, q = (np.c_[(rows - mean) / std, np.full(len(rows), BIAS)] for rows in (x, q))
    y = 2 * np.eye(classes)[labels.numpy()] - 1
    rows = np.r_[x, np.sqrt(l2) * np.eye(x.shape[1])]
    weight = np.linalg.lstsq(rows, np.r_[y, np.zeros((x.shape[1], classes))], rcond=None)[0]
    return q @ weight


@pytest.mark.parametrize("l2", [L2, 1.0])
@pytest.mark.parametrize(("count", "width"), [(40, 6), (12, 30)])  # more samples than features, and fewer
def test_the_closed_forms_are_numpys_least_squares(count, width, l2):
    features, labels = data(count, 1, width=width)
    queries, _ = data(50, 2, width=width)
    fitted = fit_least_squares(features, labels, num_classes=4, l2=l2)
    expected = scores_by_lstsq(features, labels, queries, 4, l2)
    scaled = (queries.double() - fitted.mean) / fitted.std
    got = torch.cat([scaled, torch.full((50, 1), BIAS, dtype=torch.float64)], 1) @ fitted.weight
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert fitted.predict(queries).tolist() == expected.argmax(1).tolist()


def test_top1_is_the_mean_over_seeded_draws():
    train, labels = data(200, 1)
    val, truth = data(100, 2)
    expected = []
    for seed in (0, 1, 2):
        rows = choose_shots(labels, 5, seed=seed)
        scores = scores_by_lstsq(train[rows], labels[rows], val, 4, L2)
        expected.append((scores.argmax(1) == truth.numpy()).mean())
    assert len(set(expected)) > 1
    assert few_shot_top1(train, labels, val, truth, shots=5) == pytest.approx(np.mean(expected))


def test_shots_are_that_many_of_each_class_seeded_and_nested_and_a_small_class_gives_all():
    labels = torch.tensor([0] * 30 + [1] * 3 + [2] * 40)[torch.randperm(73)]
    rows = choose_shots(labels, 10, seed=1)
    assert labels[rows].bincount().tolist() == [10, 3, 10]
    assert rows.tolist() == sorted(set(rows.tolist())) == choose_shots(labels, 10, seed=1).tolist()
    assert rows.tolist() != choose_shots(labels, 10, seed=2).tolist()
    assert set(choose_shots(labels, 5, seed=1).tolist()) < set(rows.tolist())


def test_no_samples_are_refused():
    train, labels = data(10, 1)
    with pytest.raises(DataError, match="validation data: got no samples"):
        few_shot_top1(train, labels, train[:0], labels[:0], shots=5)
