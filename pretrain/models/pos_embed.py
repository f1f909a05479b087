"""Position embeddings: fixed sine-cosine ones, and learned ones at a new resolution.

Called by vit.py, objectives/mae.py, and by whatever loads weights trained at another image size.
"""

# N patches, P prefix tokens, D width, G grid side

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_pos_embed(grid: int, embed_dim: int, *, num_prefix_tokens: int = 1) -> Tensor:
    """Fixed two-dimensional sine-cosine positions of MAE (arXiv:2111.06377), float32 (1, P+N, D).

    The first half of the width encodes the column, the second the row, as in the published weights;
    prefix tokens get zeros. Raises ValueError if the width is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4: got {embed_dim}")
    frequency = 1.0 / 10000.0 ** (torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    place = torch.arange(grid, dtype=torch.float64)
    row_N, column_N = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    parts = []
    for axis_N in (column_N, row_N):
        angle = axis_N[:, None] * frequency
        parts += [angle.sin(), angle.cos()]
    patches = torch.cat(parts, dim=1)
    prefix = torch.zeros(num_prefix_tokens, embed_dim, dtype=torch.float64)
    return torch.cat([prefix, patches]).to(torch.float32)[None]


def resample_pos_embed(
    pos: Tensor,
    new_grid: int | tuple[int, int],
    num_prefix_tokens: int,
    rule: Literal["timm", "hf"] = "timm",
) -> Tensor:
    """Positions (1, P+N, D) for `new_grid` patches a side, or rows and columns of them; dtype kept.

    Prefix tokens are left as they are; the square grid is resampled in float32, bicubic. "timm" filters
    against aliasing, "hf" (MAE, detectron2, transformers) does not. Raises ValueError if the patches
    are not a square.
    """
    prefix, patches = pos[:, :num_prefix_tokens], pos[:, num_prefix_tokens:]
    _, N, D = patches.shape
    G = math.isqrt(N)
    if G * G != N:
        raise ValueError(f"position embeddings of {N} patches are not a square grid")
    size = (new_grid, new_grid) if isinstance(new_grid, int) else new_grid
    if size == (G, G):
        return pos
    image = patches.to(torch.float32).reshape(1, G, G, D).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=rule == "timm")
    resampled = image.permute(0, 2, 3, 1).flatten(1, 2).to(pos.dtype)
    return torch.cat([prefix, resampled], dim=1)


def resample_bias_table(table: Tensor, new_window: int) -> Tensor:
    """Swin's biases by offset, ((2w-1)², heads), for another window: bicubic in float32, as its authors do.

    The dtype is kept.
    """
    side = math.isqrt(len(table))
    image = table.to(torch.float32).T.reshape(1, -1, side, side)
    new_side = 2 * new_window - 1
    image = F.interpolate(image, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return image.flatten(2)[0].T.contiguous().to(table.dtype)
