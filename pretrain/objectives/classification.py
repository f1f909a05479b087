"""Supervised classification: softmax or sigmoid cross-entropy on a linear head. Called by train.py and evaluate.py."""

# B samples, D width, K classes, E = ceil(K / 8) bytes of a sample's labels

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import DataError
from pretrain.keyed_random import sample_keys
from pretrain.models.backbone import Backbone
from pretrain.models.heads import LinearHead

BITS = 8  # of a byte of label bits; the lowest is the first class's


def check_labels(labels: Tensor, num_classes: int, weights: Tensor | None = None) -> None:
    """Raise DataError for a label outside 0 … num_classes-1.

    `labels` (B,) and `weights` (B,) are host tensors: looking at them costs no device sync, where an
    index out of range on a GPU would be an assertion without a name. Samples of weight 0 are pads
    and may carry anything. (Label bits are checked where they are made, data/label_bits.py.)
    """
    wrong = (labels < 0) | (labels >= num_classes)
    if weights is not None:
        wrong &= weights > 0
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        label = int(labels[row])
        what = "a sample without a label" if label == -1 else f"label {label}"
        raise DataError(
            f"{what} (row {row} of the batch) where labels 0 to {num_classes - 1} are expected; "
            f"see `pretrain data stats` for the dataset's labels, or set objective.num_classes"
        )


def multi_hot(label_bits_BE: Tensor, num_classes: int) -> Tensor:
    """Label bits uint8 (B, E) as float32 (B, K): 1 for each class that a sample has."""
    bit = torch.arange(BITS, device=label_bits_BE.device, dtype=torch.uint8)
    bits = (label_bits_BE[:, :, None] >> bit) & 1
    return bits.flatten(1)[:, :num_classes].to(torch.float32)


def ranking_precision(logits_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Label-ranking average precision of each sample (B,): the mean, over its classes, of the share of its own
    classes among those ranked as high or higher; 1 for a sample without classes. As in scikit-learn
    (`label_ranking_average_precision_score`), but for equal scores, which are ranked by class number here.
    """
    order_BK = logits_BK.argsort(dim=1, descending=True, stable=True)
    hit_BK = target_BK.gather(1, order_BK)
    rank_K = torch.arange(1, hit_BK.shape[1] + 1, device=hit_BK.device, dtype=hit_BK.dtype)
    total_B = hit_BK.sum(dim=1)
    precision_B = (hit_BK * hit_BK.cumsum(dim=1) / rank_K).sum(dim=1) / total_B.clamp(min=1.0)
    return torch.where(total_B > 0, precision_B, 1.0)


class Classification(nn.Module):
    """Cross-entropy over `num_classes`, with label smoothing, as a sum over weighted samples.

    loss "softmax": one class a sample. "sigmoid": each class on its own, so that a sample may have any
    number of them. class_reduction, of the sigmoid loss: "sum" over classes, as big_vision has it
    (arXiv:2106.10270, 2106.04560), or "mean", as timm and DeiT-III have it (arXiv:2204.07118); one is
    `num_classes` times the other. Smoothing by s moves a softmax's target to (1 - s) t + s / K (torch's
    and timm's rule), and a sigmoid's to the same, timm's rule for one class a sample; a sample with n
    classes then has targets of 1 - s + s / K and of s / K, too.

    head_bias: the head's first bias; big_vision starts a sigmoid loss over many classes at -10, for most
    are absent, and a bias of 0 begins with a loss of K ln 2.

    `seed` keys stochastic depth to (seed, position). Parameters: `backbone.*`, `head.weight`,
    `head.bias`; the head's weights come from torch's global generator.
    """

    teacher: None = None

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        class_reduction: Literal["sum", "mean"] = "sum",
        label_smoothing: float = 0.0,
        head_bias: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(in_features=backbone.embed_dim, num_classes=num_classes)
        nn.init.constant_(self.head.bias, head_bias)
        self.num_classes = num_classes
        self.loss = loss
        self.class_scale = 1.0 / num_classes if class_reduction == "mean" else 1.0
        self.label_smoothing = label_smoothing
        self.seed = seed

    def count(self, batch: Mapping[str, Any]) -> float:
        """What the loss sum is divided by: weighted images. Reads `weights` (B,) of a host batch only."""
        return float(batch["weights"].sum())

    def forward(self, images_BCHW: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum (float32 scalar) and metric sums over weighted samples.

        images: normalised floats (B, 3, S, S). batch, on the images' device: labels int64 (B,), weights
        float32 (B,), positions int64 (B,); of mixed images (data/mixup.py) also other_labels int64 (B,) and
        own_share float32 (B,), and right is then the label with the larger share. Labels are trusted here:
        see check_labels. Metric: "top1", the weight of correct samples.

        Of multi-label data, labels are not looked at; instead label_bits uint8 (B, E), and of mixed images
        other_label_bits. Metrics: "precision_at_1", the weight of samples whose first class is one of
        theirs, and while not training "ranking_precision", see there.
        """
        weights_B = batch["weights"].to(torch.float32)
        real_B = weights_B > 0
        keys_B = sample_keys(self.seed, batch["positions"])
        # float32: a bf16 softmax loses small probabilities
        logits_BK = self.head(self.backbone(images_BCHW, keys_B)).to(torch.float32)
        if "label_bits" in batch:
            loss_B, metrics = self._of_label_sets(logits_BK, batch)
        else:
            loss_B, metrics = self._of_labels(logits_BK, batch, real_B)
        # where, not a product alone: a pad's loss times 0 is NaN if it overflowed
        loss = torch.where(real_B, loss_B * weights_B, 0.0).sum()
        return loss, {name: (value_B * weights_B).sum() for name, value_B in metrics.items()}

    def _of_labels(
        self, logits_BK: Tensor, batch: Mapping[str, Any], real_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Each sample's loss and metrics, of data with one label each."""
        labels_B = torch.where(real_B, batch["labels"], 0)  # a pad's label is -1
        others_B, share_B = batch.get("other_labels"), batch.get("own_share")
        likelier_B = labels_B
        if others_B is not None and share_B is not None:
            # Both losses are linear in their target, so that of a mixture is the mixture of its parts'.
            others_B = torch.where(real_B, others_B, 0).clamp(min=0)  # -1 beside a pad, where its share is 0
            likelier_B = torch.where(share_B >= 0.5, labels_B, others_B)
        if self.loss == "sigmoid":
            target_BK = F.one_hot(labels_B, self.num_classes).to(torch.float32)
            if others_B is not None and share_B is not None:
                other_BK = F.one_hot(others_B, self.num_classes).to(torch.float32)
                target_BK = torch.lerp(other_BK, target_BK, share_B[:, None])
            loss_B = self._binary_cross_entropy(logits_BK, target_BK)
        else:
            loss_B = self._cross_entropy(logits_BK, labels_B)
            if others_B is not None and share_B is not None:
                loss_B = share_B * loss_B + (1.0 - share_B) * self._cross_entropy(logits_BK, others_B)
        with torch.no_grad():
            return loss_B, {"top1": (logits_BK.argmax(dim=1) == likelier_B).to(torch.float32)}

    def _of_label_sets(self, logits_BK: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each sample's loss and metrics, of data with any number of labels each; a pad has none."""
        assert self.loss == "sigmoid", "num_classes_for refuses several labels a sample for a softmax"
        own_BK = multi_hot(batch["label_bits"], self.num_classes)
        target_BK, likelier_BK = own_BK, own_BK
        if "other_label_bits" in batch:
            other_BK, share_B1 = (
                multi_hot(batch["other_label_bits"], self.num_classes),
                batch["own_share"][:, None],
            )
            target_BK = torch.lerp(other_BK, own_BK, share_B1)
            likelier_BK = torch.where(share_B1 >= 0.5, own_BK, other_BK)
        with torch.no_grad():
            first_B1 = logits_BK.argmax(dim=1, keepdim=True)
            metrics = {"precision_at_1": likelier_BK.gather(1, first_B1)[:, 0]}
            if not self.training:  # it sorts
                metrics["ranking_precision"] = ranking_precision(logits_BK, likelier_BK)
        return self._binary_cross_entropy(logits_BK, target_BK), metrics

    def _cross_entropy(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=self.label_smoothing)

    def _binary_cross_entropy(self, logits_BK: Tensor, target_BK: Tensor) -> Tensor:
        if self.label_smoothing:
            target_BK = target_BK * (1.0 - self.label_smoothing) + self.label_smoothing / self.num_classes
        loss_BK = F.binary_cross_entropy_with_logits(logits_BK, target_BK, reduction="none")
        return loss_BK.sum(dim=1) * self.class_scale
