"""How much of an image's class each patch feature tells by itself. Called by suite.py.

Practitioners probe dense features with a linear layer from patch tokens to the labels of pixels. Image-labelled data
has none, so here a patch's label is its image's class: one linear classifier, fitted by ridge regression to all
patches of the training images, classifies each patch of the validation images alone, and the share of patches that
it gets right is the result. What that measures: whether the class can be read linearly from local features, without
pooling. What it does not: where things are. A patch of mere background is counted as wrong unless attention has
carried the class there, so that the number stays below an image's own, and features that are the same everywhere
in an image do well. Compare it with itself along a run and with the same network untrained, not with a
segmentation's. The parts below take a label a patch (-1: not counted): labels from boxes or masks need no other code.
"""

# B batch, D width, h and w patches down and across, P patches, C classes

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed import sum_over_ranks
from pretrain.errors import DataError

RIDGE = 1e-3  # on features of unit variance, the loss being a mean: for conditioning, patches are many


def labels_of_patches(labels_B: Tensor, grid_BDhw: Tensor) -> Tensor:
    """Each patch has its image's label: int64 (B, h, w)."""
    h, w = grid_BDhw.shape[2:]
    return labels_B[:, None, None].expand(-1, h, w)


class PatchStatistics:
    """Sums over patches, float64 on `device`, from which the classifier follows: one pass, no patch is kept.

    Memory is D² + C·D numbers, whatever the number of images.
    """

    def __init__(self, *, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.device = num_classes, device
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, grid_BDhw: Tensor, labels_Bhw: Tensor) -> None:
        """Patch features, floating point, and the class of each patch, int64; those below 0 are not counted."""
        x_PD, labels_P = _rows(grid_BDhw, labels_Bhw)
        D = x_PD.shape[1]
        if self._sums is None:
            shapes = ((D, D), (self.num_classes, D), (self.num_classes,))
            gram, by_class, counts = (
                torch.zeros(shape, dtype=torch.float64, device=self.device) for shape in shapes
            )
            self._sums = gram, by_class, counts
        gram_DD, by_class_CD, counts_C = self._sums
        gram_DD += x_PD.T @ x_PD
        by_class_CD.index_add_(0, labels_P, x_PD)
        counts_C.index_add_(0, labels_P, torch.ones_like(labels_P, dtype=torch.float64))

    def fit(self, *, ridge: float = RIDGE) -> PatchClassifier:
        """The classifier of all ranks' patches; all ranks together, and each gets it.

        Least squares from features, standardised, to one-hot classes, with `ridge` times the squared weights added to
        the mean squared error; the bias is free. Raises DataError when no patch was counted.
        """
        if self._sums is None:
            raise DataError("the dense probe's training data: got no samples; name a dataset with some")
        gram_DD, by_class_CD, counts_C = (sum_over_ranks(one) for one in self._sums)
        n = counts_C.sum()
        if not n:
            raise DataError(
                "the dense probe's training data: got no labelled samples; name a dataset with some"
            )
        if not bool(
            torch.isfinite(gram_DD).all()
        ):  # nothing can be learned from them, and no patch will be right
            D, C = len(gram_DD), len(counts_C)
            nan = torch.full((D, C), torch.nan, dtype=torch.float64, device=self.device)
            return PatchClassifier(weight=nan, bias=nan[0], mean=nan[:, 0], std=nan[:, 0])
        mean_D = by_class_CD.sum(0) / n
        prior_C = counts_C / n
        covariance_DD = gram_DD / n - torch.outer(mean_D, mean_D)
        variance_D = covariance_DD.diagonal()
        # Of a feature that never changes, rounding leaves a variance that is not to be divided by.
        constant_D = variance_D <= 1e-10 * gram_DD.diagonal() / n
        std_D = torch.where(constant_D, 1.0, variance_D.clamp(min=0.0).sqrt())
        correlation_DD = covariance_DD / torch.outer(std_D, std_D)
        cross_DC = ((by_class_CD / n - torch.outer(prior_C, mean_D)) / std_D).T
        correlation_DD.diagonal().add_(ridge)
        weight_DC = torch.cholesky_solve(cross_DC, torch.linalg.cholesky(correlation_DD))
        return PatchClassifier(weight=weight_DC, bias=prior_C, mean=mean_D, std=std_D)


class PatchClassifier:
    """Scores of a patch: ((feature - mean) / std) weight + bias.

    All float64: weight (D, C), bias (C,), mean and std (D,).
    """

    def __init__(self, *, weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> None:
        self.weight, self.bias, self.mean, self.std = weight, bias, mean, std
        self._counts = torch.zeros(2, dtype=torch.float64, device=weight.device)  # right, seen

    def add(self, grid_BDhw: Tensor, labels_Bhw: Tensor) -> None:
        """Classify patches and count; arguments as of PatchStatistics.add. One that is not finite is not right."""
        x_PD, labels_P = _rows(grid_BDhw, labels_Bhw)
        scores_PC = ((x_PD - self.mean) / self.std) @ self.weight + self.bias
        right = ((scores_PC.argmax(dim=1) == labels_P) & torch.isfinite(scores_PC).all(dim=1)).sum()
        self._counts += torch.stack([right, torch.full_like(right, len(labels_P))])

    def top1(self) -> float:
        """The share of all ranks' patches, so far, that were right; all ranks together. DataError if there are none."""
        right, seen = sum_over_ranks(self._counts.clone()).tolist()
        if not seen:
            raise DataError(
                "the dense probe's validation data: got no labelled samples; name a dataset with some"
            )
        return right / seen


def _rows(grid_BDhw: Tensor, labels_Bhw: Tensor) -> tuple[Tensor, Tensor]:
    """Features float64 (P, D) and classes int64 (P,) of the patches that count."""
    counted = labels_Bhw.flatten() >= 0
    x_PD = grid_BDhw.permute(0, 2, 3, 1).flatten(0, 2)[counted]
    return x_PD.to(torch.float64), labels_Bhw.flatten()[counted]
