"""Logistic regression on frozen features, its L2 penalty chosen on held-out training samples.

Convex and full-batch, so that the result has no learning rate or schedule to tune. Called by suite.py.
"""

# N samples, D width, C classes

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.errors import DataError
from pretrain.probes.features import Moved, check_probe_data, mean_and_std, not_said

L2_VALUES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # strongest first: each fit starts from the one before
HOLDOUT_FRACTION = 0.1


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted classifier: logits are ((features - mean) / std) weightᵀ + bias."""

    weight: Tensor  # float32 (C, D)
    bias: Tensor  # float32 (C,)
    mean: Tensor  # float32 (D,)
    std: Tensor  # float32 (D,)
    l2: float
    holdout_top1: float  # of the chosen penalty, on training samples that fit did not see

    def predict(self, features: Tensor) -> Tensor:
        """Class of each row of `features` (N, D): int64 (N,)."""
        standardised = (features.to(torch.float32) - self.mean) / self.std
        return F.linear(standardised, self.weight, self.bias).argmax(dim=1)


def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    l2: float,
    start: tuple[Tensor, Tensor] | None = None,
    max_iterations: int = 200,
    moved: Moved = not_said,
) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) that minimise mean cross-entropy + l2 / 2 · |weight|².

    features float (N, D), whose dtype the fit is computed in; labels int64 (N,). L-BFGS with a strong
    Wolfe line search, from `start` or from zeros; `moved` is called at each evaluation.
    """
    if start is None:
        start = features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes)
    weight, bias = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradients() -> Tensor:
        moved()
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(loss_and_gradients)
    return weight.detach(), bias.detach()


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    l2_values: tuple[float, ...] = L2_VALUES,
    holdout_fraction: float = HOLDOUT_FRACTION,
    seed: int = 0,
    moved: Moved = not_said,
) -> LinearProbe:
    """Choose the penalty by top-1 on a held-out part of the training samples, then fit on all of them.

    features float (N, D), labels int64 (N,); `seed` picks the part. Of penalties that do equally well
    the strongest wins. Raises DataError for unlabelled samples, or fewer than two.
    """
    check_probe_data(features, labels, name="training")
    N = len(features)
    if N < 2:
        raise DataError(f"the linear probe needs training samples to fit and to hold out: got {N}")
    num_classes = int(labels.max()) + 1
    features = features.to(torch.float32)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held = min(max(1, round(N * holdout_fraction)), N - 1)
    holdout, fitted = order[:held], order[held:]

    mean, std = mean_and_std(features[fitted])
    x, x_holdout = (features[fitted] - mean) / std, (features[holdout] - mean) / std
    best_top1, best_l2 = -1.0, l2_values[0]
    start = None
    for l2 in sorted(l2_values, reverse=True):
        start = fit_logistic_regression(
            x, labels[fitted], num_classes=num_classes, l2=l2, start=start, moved=moved
        )
        top1 = _top1(F.linear(x_holdout, *start).argmax(dim=1), labels[holdout])
        if top1 > best_top1:
            best_top1, best_l2 = top1, l2

    mean, std = mean_and_std(features)
    weight, bias = fit_logistic_regression(
        (features - mean) / std, labels, num_classes=num_classes, l2=best_l2, moved=moved
    )
    return LinearProbe(weight=weight, bias=bias, mean=mean, std=std, l2=best_l2, holdout_top1=best_top1)


def linear_top1(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    l2_values: tuple[float, ...] = L2_VALUES,
    holdout_fraction: float = HOLDOUT_FRACTION,
    seed: int = 0,
    moved: Moved = not_said,
) -> float:
    """The fraction of validation samples whose class a probe fitted on the training samples finds.

    Validation samples take no part in choosing the penalty. Arguments and errors as fit_linear_probe.
    """
    check_probe_data(val_features, val_labels, name="validation")
    probe = fit_linear_probe(
        train_features,
        train_labels,
        l2_values=l2_values,
        holdout_fraction=holdout_fraction,
        seed=seed,
        moved=moved,
    )
    return _top1(probe.predict(val_features), val_labels)


def _top1(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).to(torch.float64).mean().item()
