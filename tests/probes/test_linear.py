"""Logistic regression against Newton's method in numpy, and how its penalty is chosen."""

import numpy as np
import pytest
import torch

from pretrain.errors import DataError
from pretrain.probes.linear import L2_VALUES, fit_linear_probe, fit_logistic_regression, linear_top1


def data(count, seed, classes=3, width=5, noise=1.2):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + noise * torch.randn(count, width, generator=generator), labels


def newton(features, labels, classes, l2, steps=50):
    """The minimum of mean cross-entropy + l2 / 2 |W|² by Newton's method: (C, D+1), biases last."""
    x = np.c_[features.double().numpy(), np.ones(len(features))]
    N, D = x.shape
    target = np.eye(classes)[labels.numpy()]
    penalty = np.full((classes, D), l2)
    penalty[:, -1] = 0.0
    w = np.zeros((classes, D))
    for _ in range(steps):
        logits = x @ w.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = (p - target).T @ x / N + penalty * w
        hessian = np.diag(penalty.ravel())
        for a in range(classes):
            for b in range(classes):
                curvature = p[:, a] * ((a == b) - p[:, b])
                hessian[a * D : (a + 1) * D, b * D : (b + 1) * D] += (x * curvature[:, None]).T @ x / N
        # biases may shift together without any effect: lstsq takes the shortest step
        w -= np.linalg.lstsq(hessian, gradient.ravel(), rcond=1e-12)[0].reshape(classes, D)
    assert np.abs(gradient).max() < 1e-10
    return w


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-4])
def test_the_fit_is_newtons_minimum(l2):
    features, labels = data(200, 1)
    wanted = newton(features, labels, 3, l2)
    weight, bias = fit_logistic_regression(features.double(), labels, num_classes=3, l2=l2)
    np.testing.assert_allclose(weight, wanted[:, :-1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(bias - bias.mean(), wanted[:, -1] - wanted[:, -1].mean(), rtol=0, atol=1e-4)


def test_float32_and_another_start_come_to_the_same_minimum():
    features, labels = data(200, 1)
    wanted = newton(features, labels, 3, 1e-2)
    start = torch.ones(3, 5), torch.ones(3)
    weight, _ = fit_logistic_regression(features, labels, num_classes=3, l2=1e-2, start=start)
    np.testing.assert_allclose(weight, wanted[:, :-1], rtol=0, atol=1e-3)


def test_top1_equals_newtons_with_the_same_penalty_on_standardised_features():
    train, labels = data(200, 1)
    val, truth = data(300, 2)
    got = linear_top1(train, labels, val, truth, l2_values=(1e-2,))
    mean, std = train.mean(0), train.std(0, correction=0)
    w = newton((train - mean) / std, labels, 3, 1e-2)
    logits = np.c_[((val - mean) / std).double().numpy(), np.ones(300)] @ w.T
    wanted = (logits.argmax(1) == truth.numpy()).mean()
    assert got == pytest.approx(wanted, abs=1.5 / 300)
    assert 0.5 < wanted < 0.98


def test_the_penalty_is_the_one_that_does_best_on_held_out_samples():
    # many useless features and few samples: a weak penalty fits noise
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(2).repeat(80)
    features = torch.randn(160, 120, generator=generator)
    features[:, 0] += 2.0 * (labels * 2 - 1)
    probe = fit_linear_probe(features, labels, holdout_fraction=0.5, seed=1)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    holdout, fitted = order[:80], order[80:]
    mean, std = features[fitted].mean(0), features[fitted].std(0, correction=0)
    x = (features - mean) / std
    scores = {}
    for l2 in L2_VALUES:
        weight, bias = fit_logistic_regression(x[fitted], labels[fitted], num_classes=2, l2=l2)
        predicted = (x[holdout] @ weight.T + bias).argmax(1)
        scores[l2] = (predicted == labels[holdout]).double().mean().item()
    assert len(set(scores.values())) > 1
    assert scores[probe.l2] == pytest.approx(max(scores.values()), abs=1 / 80 + 1e-9)
    assert probe.l2 >= 1e-2
    assert probe.holdout_top1 == pytest.approx(scores[probe.l2], abs=1 / 80 + 1e-9)


def test_units_and_offsets_of_features_do_not_matter():
    train, labels = data(200, 1)
    val, truth = data(300, 2)
    scale, offset = torch.tensor([1e-3, 1.0, 40.0, 0.2, 7.0]), torch.tensor([0.0, 3.0, -50.0, 1.0, 0.0])
    wanted = linear_top1(train, labels, val, truth)
    got = linear_top1(train * scale + offset, labels, val * scale + offset, truth)
    assert got == pytest.approx(wanted, abs=1.5 / 300)


def test_a_feature_that_never_changes_does_no_harm():
    train, labels = data(200, 1)
    val, truth = data(300, 2)
    wanted = linear_top1(train, labels, val, truth)
    got = linear_top1(
        torch.cat([train, torch.full((200, 1), 0.3)], 1),
        labels,
        torch.cat([val, torch.full((300, 1), 0.3)], 1),
        truth,
    )
    assert got == pytest.approx(wanted, abs=1.5 / 300)


def test_one_seed_gives_one_result():
    train, labels = data(60, 1)
    first, second = fit_linear_probe(train, labels, seed=3), fit_linear_probe(train, labels, seed=3)
    assert torch.equal(first.weight, second.weight)
    assert first.l2 == second.l2


def test_the_holdout_of_two_samples_is_one_and_of_one_sample_an_error():
    train, labels = torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])
    fit_linear_probe(train, labels)
    with pytest.raises(DataError, match="got 1"):
        fit_linear_probe(train[:1], labels[:1])


def test_it_works_under_no_grad_as_evaluation_calls_it():
    train, labels = data(60, 1)
    with torch.no_grad():
        assert linear_top1(train, labels, train, labels) > 0.6


def test_samples_without_labels_are_refused():
    train, labels = data(10, 1)
    with pytest.raises(DataError, match="validation data: 10 of 10"):
        linear_top1(train, labels, train, labels * 0 - 1)
