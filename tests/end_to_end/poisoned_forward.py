"""`pretrain …`, in which a line of the network's forward has no finite gradient: its values are right."""

from __future__ import annotations

import sys
from typing import Any

import torch

from pretrain.cli import main
from pretrain.models.vit import VisionTransformer

sound = VisionTransformer.forward


def forward(self: VisionTransformer, *arguments: Any, **named: Any) -> torch.Tensor:
    pooled = sound(self, *arguments, **named)
    return pooled + torch.sqrt(pooled * 0.0)  # THE LINE: the root's slope at 0 is infinite


if __name__ == "__main__":
    VisionTransformer.forward = forward  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
