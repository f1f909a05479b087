"""What stands on top of a backbone's features. Used by objectives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Features (B, in_features) to logits (B, num_classes); `weight` and `bias` named as timm's head."""

    def __init__(self, *, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, features_BD: Tensor) -> Tensor:
        return F.linear(features_BD, self.weight, self.bias)
