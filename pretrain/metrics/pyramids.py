"""Work and size of backbones whose maps shrink from stage to stage: Swin and PVT v2. Called by dry runs; no torch.

The conventions of flops.py; names and structure are timm's (swin_transformer.py, pvt_v2.py).
"""

# C channels, G side of a stage's map, W side of a window

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.metrics.blocks import Blocks, Network, linear
from pretrain.metrics.flops import CHANNELS


@dataclass(frozen=True, kw_only=True)
class SwinSize:
    """arXiv:2103.14030, table 7; widths double from stage to stage."""

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


SWIN_SIZES = {
    "tiny": SwinSize(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": SwinSize(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": SwinSize(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": SwinSize(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


@dataclass(frozen=True, kw_only=True)
class PVTSize:
    """arXiv:2106.13797, table 1."""

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)


PVT_SIZES = {
    "b0": PVTSize(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "b1": PVTSize(embed_dims=(64, 128, 320, 512), depths=(2, 2, 2, 2)),
    "b2": PVTSize(embed_dims=(64, 128, 320, 512), depths=(3, 4, 6, 3)),
    "b3": PVTSize(embed_dims=(64, 128, 320, 512), depths=(3, 4, 18, 3)),
    "b4": PVTSize(embed_dims=(64, 128, 320, 512), depths=(3, 8, 27, 3)),
    "b5": PVTSize(embed_dims=(64, 128, 320, 512), depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}


def swin_network(
    *,
    image_size: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    window_size: int = 7,
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
) -> Network:
    """A Swin transformer. Maps are padded to whole windows; a map that one window covers is one window."""
    side, dim = image_size // patch_size, embed_dim
    patch_inputs = CHANNELS * patch_size**2
    other_flops = 2.0 * side**2 * patch_inputs * dim
    other = linear(patch_inputs, dim) + 2 * dim
    kept = float(image_size**2 * CHANNELS) + 2.0 * side**2 * dim
    stages = []
    for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        if stage:  # four neighbours side by side, normalised, to twice the width
            side, dim = math.ceil(side / 2), 2 * dim
            other_flops += 2.0 * side**2 * (2 * dim) * dim
            other += 2 * (2 * dim) + linear(2 * dim, dim, bias=False)
            kept += 2.0 * side**2 * (2 * dim)
        window = min(window_size, side)
        padded = math.ceil(side / window) * window
        stages.append(
            Blocks(
                depth=depth,
                num_tokens=side**2,
                embed_dim=dim,
                hidden_dim=int(dim * mlp_ratio),
                num_heads=heads,
                num_queries=padded**2,
                keys_a_query=window**2,
                window_side=window,
            )
        )
    return Network(
        blocks=stages,
        other_flops=other_flops,
        other_parameters=other + 2 * dim,
        other_kept_values=kept + 2.0 * side**2 * dim,
        out_dim=dim,
        out_tokens=side**2,
    )


def pvt_network(
    *,
    image_size: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    mlp_ratios: Sequence[float],
    num_heads: Sequence[int],
    reductions: Sequence[int],
) -> Network:
    """A pyramid vision transformer, version 2: overlapping patches, keys and values of reduced maps, a depthwise
    convolution in each MLP.
    """
    side, channels = image_size, CHANNELS
    other_flops, other, kept = 0.0, 0, float(image_size**2 * CHANNELS)
    stages = []
    for stage, (dim, depth, ratio, heads, reduction) in enumerate(
        zip(embed_dims, depths, mlp_ratios, num_heads, reductions, strict=True)
    ):
        kernel, stride = (3, 2) if stage else (7, 4)
        side = (side + 2 * (kernel // 2) - kernel) // stride + 1
        other_flops += 2.0 * side**2 * channels * kernel**2 * dim
        other += linear(channels * kernel**2, dim) + 2 * dim + 2 * dim  # the stage's last norm, too
        kept += 4.0 * side**2 * dim
        stages.append(
            Blocks(
                depth=depth,
                num_tokens=side**2,
                embed_dim=dim,
                hidden_dim=int(dim * ratio),
                num_heads=heads,
                num_key_tokens=(side // reduction) ** 2,
                reduction=reduction,
                depthwise=True,
            )
        )
        channels = dim
    return Network(
        blocks=stages,
        other_flops=other_flops,
        other_parameters=other,
        other_kept_values=kept,
        out_dim=channels,
        out_tokens=side**2,
    )
