"""Weights that make mistakes visible, and images."""

from __future__ import annotations

import torch
from torch import nn


def shaken(module: nn.Module, spread: float = 0.1) -> nn.Module:
    """The module with weights far enough from their initial values that every part matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module


def some_images(count: int, height: int, width: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, height, width or height, generator=generator)
