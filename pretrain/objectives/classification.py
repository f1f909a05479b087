"""Supervised classification: softmax cross-entropy on a linear head. Called by train.py and evaluate.py."""

# B samples, D width, K classes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import DataError
from pretrain.keyed_random import sample_keys
from pretrain.models.backbone import Backbone
from pretrain.models.heads import LinearHead


def check_labels(labels: Tensor, num_classes: int, weights: Tensor | None = None) -> None:
    """Raise DataError for a label outside 0 … num_classes-1.

    `labels` (B,) and `weights` (B,) are host tensors: looking at them costs no device sync, where an
    index out of range on a GPU would be an assertion without a name. Samples of weight 0 are pads
    and may carry anything.
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


class Classification(nn.Module):
    """Cross-entropy over `num_classes`, with label smoothing, as a sum over weighted samples.

    `seed` keys stochastic depth to (seed, position). Parameters: `backbone.*`, `head.weight`,
    `head.bias`; the head's weights come from torch's global generator.
    """

    def __init__(
        self, backbone: Backbone, *, num_classes: int, label_smoothing: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(in_features=backbone.embed_dim, num_classes=num_classes)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.seed = seed

    def count(self, batch: Mapping[str, Any]) -> float:
        """What the loss sum is divided by: weighted images. Reads `weights` (B,) of a host batch only."""
        return float(batch["weights"].sum())

    def forward(self, images_BCHW: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum (float32 scalar) and metric sums {"top1": weight of correct samples}.

        images: normalised floats (B, 3, S, S). batch, on the images' device: labels int64 (B,), weights
        float32 (B,), positions int64 (B,); of mixed images (data/mixup.py) also other_labels int64 (B,) and
        own_share float32 (B,), and right is then the label with the larger share. Labels are trusted here:
        see check_labels.
        """
        weights_B = batch["weights"].to(torch.float32)
        real_B = weights_B > 0
        labels_B = torch.where(real_B, batch["labels"], 0)  # a pad's label is -1
        others_B, share_B = batch.get("other_labels"), batch.get("own_share")
        keys_B = sample_keys(self.seed, batch["positions"])
        # float32: a bf16 softmax loses small probabilities
        logits_BK = self.head(self.backbone(images_BCHW, keys_B)).to(torch.float32)
        loss_B = self._cross_entropy(logits_BK, labels_B)
        likelier_B = labels_B
        if others_B is not None and share_B is not None:
            # Cross-entropy is linear in its target, so that of a mixture is the mixture of its parts'.
            others_B = torch.where(real_B, others_B, 0).clamp(min=0)  # -1 beside a pad, where its share is 0
            loss_B = share_B * loss_B + (1.0 - share_B) * self._cross_entropy(logits_BK, others_B)
            likelier_B = torch.where(share_B >= 0.5, labels_B, others_B)
        with torch.no_grad():
            correct_B = (logits_BK.argmax(dim=1) == likelier_B).to(torch.float32)
            top1 = (correct_B * weights_B).sum()
        # where, not a product alone: a pad's loss times 0 is NaN if it overflowed
        return torch.where(real_B, loss_B * weights_B, 0.0).sum(), {"top1": top1}

    def _cross_entropy(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=self.label_smoothing)
