"""Least squares on a few images a class, as the vision transformer's paper has it (arXiv:2010.11929, section 4).

The closed form and its constants are those of the paper's own evaluator (google-research/big_vision,
evaluators/fewshot_lsr.py). Called by suite.py.
"""

# N samples, K those that are learned from, Q queries, D width, C classes

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.probes.features import Moved, check_probe_data, not_said

BIAS = 100.0  # big_vision: a constant feature so large that the penalty hardly touches the bias
L2 = 2.0**10  # big_vision
NUM_SEEDS = 3  # big_vision: draws of the images, of which the mean is reported


def choose_shots(labels: Tensor, shots: int, *, seed: int) -> Tensor:
    """Rows of `shots` samples of each class, ascending: int64 (K,). A class with fewer gives all it has.

    labels int64 (N,). The same (labels, seed) give the same rows, and fewer shots a part of those of more.
    """
    raw = np.random.Philox(key=np.array([seed, 0x5407], np.uint64)).random_raw(len(labels))
    classes = labels.cpu().numpy()
    order = np.lexsort((raw, classes))
    ordered = classes[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    chosen = order[np.arange(len(order)) - starts < shots]
    return torch.from_numpy(np.sort(chosen))


def fit_least_squares(features: Tensor, labels: Tensor, *, num_classes: int, l2: float) -> LeastSquares:
    """Minimise |x w - y|² + l2 |w|² over w, where x is `features` standardised beside a constant BIAS, and y is 1
    for a sample's own class, -1 for the others.

    features float (K, D), labels int64 (K,). In float64, by whichever of the two closed forms is smaller.
    """
    features = features.to(torch.float64)
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = std + 1e-5  # big_vision
    x_KE = F.pad((features - mean) / std, (0, 1), value=BIAS)
    y_KC = 2.0 * F.one_hot(labels, num_classes).to(torch.float64) - 1.0
    K, E = x_KE.shape
    if K >= E:
        weight = _solve(x_KE.T @ x_KE, x_KE.T @ y_KC, l2)
    else:
        weight = x_KE.T @ _solve(x_KE @ x_KE.T, y_KC, l2)
    return LeastSquares(weight=weight, mean=mean, std=std)


def few_shot_top1(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    shots: int,
    l2: float = L2,
    seeds: tuple[int, ...] = tuple(range(NUM_SEEDS)),
    moved: Moved = not_said,
) -> float:
    """The fraction of validation samples whose class is found from `shots` training samples a class: the mean over
    `seeds`, which choose them. features float (N, D), labels int64 (N,). Raises DataError for no or unlabelled samples.
    """
    check_probe_data(train_features, train_labels, name="training")
    check_probe_data(val_features, val_labels, name="validation")
    num_classes = int(train_labels.max()) + 1
    found = 0.0
    for seed in seeds:
        rows = choose_shots(train_labels, shots, seed=seed)
        moved()
        fitted = fit_least_squares(train_features[rows], train_labels[rows], num_classes=num_classes, l2=l2)
        moved()
        found += (fitted.predict(val_features) == val_labels).to(torch.float64).mean().item()
    return found / len(seeds)


class LeastSquares:
    """Fitted scores: ((features - mean) / std, BIAS) weight. All float64: weight (D + 1, C), mean and std (D,)."""

    def __init__(self, *, weight: Tensor, mean: Tensor, std: Tensor) -> None:
        self.weight, self.mean, self.std = weight, mean, std

    def predict(self, features: Tensor) -> Tensor:
        """Class of each row of `features` (Q, D): int64 (Q,)."""
        scaled = (features.to(torch.float64) - self.mean) / self.std
        return F.linear(F.pad(scaled, (0, 1), value=BIAS), self.weight.T).argmax(dim=1)


def _solve(matrix: Tensor, right: Tensor, l2: float) -> Tensor:
    """(matrix + l2 I)⁻¹ right, of a positive semi-definite matrix."""
    shifted = matrix + l2 * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(shifted))
