"""Rotary position embeddings on a grid of patches. Called by vit.py.

Pairs of neighbouring channels of queries and keys are turned by an angle (RoFormer, arXiv:2104.09864): the first
half of a head's pairs by the row, the second by the column, as in EVA-02 (arXiv:2303.11331) and timm's
RotaryEmbeddingCat. On a grid of another size, positions are scaled onto the one that was trained on, as there.
"""

# N tokens, K head width, H heads

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def axial_rotary(
    grid: tuple[int, int], *, trained_grid: int, head_dim: int, num_prefix_tokens: int, device: torch.device
) -> Tensor:
    """Sine and cosine of each token's angles, float32 (2, P+N, K), each angle twice in a row.

    grid: rows and columns of the patches. Prefix tokens are not turned. `head_dim` is a multiple of 4.
    """
    bands = TEMPERATURE ** -(
        torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4)
    )
    row, column = (
        torch.arange(side, device=device, dtype=torch.float32) / side * trained_grid for side in grid
    )
    places = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (places[:, :, None] * bands).flatten(1).repeat_interleave(2, dim=1)
    angles = torch.cat([angles.new_zeros(num_prefix_tokens, head_dim), angles])
    return torch.stack([angles.sin(), angles.cos()])


def rotate(x_BHNK: Tensor, rope: Tensor) -> Tensor:
    """x turned by the angles of `rope`, (2, N, K) or (2, B, N, K); computed in float32, in x's dtype."""
    if rope.ndim == 4:
        rope = rope[:, :, None]
    sine, cosine = rope.unbind(0)
    turned = torch.stack([-x_BHNK[..., 1::2], x_BHNK[..., ::2]], dim=-1).flatten(-2)
    return (x_BHNK * cosine + turned * sine).to(x_BHNK.dtype)
