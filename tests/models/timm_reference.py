"""timm and transformers, as references for tests.

Both import torchvision where it is installed, and torchvision gives shapes to operators of its own
binary: where that binary does not load with this torch, declaring the operators is enough.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch


@functools.cache  # kept alive: the operators go when the library object goes
def declare_torchvision_operators() -> torch.library.Library:
    """Declare those operators that torchvision's own binary has not brought."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def import_timm() -> Any:
    """The timm package; the test is skipped where it is not installed."""
    declare_torchvision_operators()
    return pytest.importorskip("timm")


def import_transformers() -> Any:
    """The transformers package; the test is skipped where it is not installed."""
    declare_torchvision_operators()
    return pytest.importorskip("transformers")


def timm_vit(**kwargs: Any) -> Any:
    """timm's VisionTransformer with the given arguments, in eval mode."""
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**kwargs).eval()
