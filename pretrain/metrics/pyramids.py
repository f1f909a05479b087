"""Work and size of backbones whose maps shrink from stage to stage: Swin, versions 1 and 2, and PVT v2. Called by dry
runs, through cost.py; no torch.

The conventions of flops.py; names and structure are timm's (swin_transformer.py, swin_transformer_v2.py, pvt_v2.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrain.metrics.blocks import Blocks, Network, linear
from pretrain.metrics.flops import CHANNELS


def swin_network(
    *,
    image_size: int,
    patch_size: int,
    window_size: int,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    hidden_dims: Sequence[int],
    version: int = 1,
) -> Network:
    """A Swin transformer, whose widths double from stage to stage; hidden_dims: of the stages' MLPs. version: 1 or 2.

    Maps are padded to whole windows; a map that one window covers is one window.
    """
    side, dim = image_size // patch_size, embed_dims[0]
    patch_inputs = CHANNELS * patch_size**2
    other_flops = 2.0 * side**2 * patch_inputs * dim
    other = linear(patch_inputs, dim) + 2 * dim
    kept = float(image_size**2 * CHANNELS) + side**2 * dim  # a norm's input; what it gives is the blocks'
    stages = []
    for stage, (dim, depth, heads, hidden_dim) in enumerate(
        zip(embed_dims, depths, num_heads, hidden_dims, strict=True)
    ):
        if stage:  # four neighbours side by side to twice the width, normalised before that, or by version 2 after it
            normalised = 2 * dim if version == 1 else dim
            side = math.ceil(side / 2)
            other_flops += 2.0 * side**2 * (2 * dim) * dim
            other += 2 * normalised + linear(2 * dim, dim, bias=False)
            kept += side**2 * (2.0 * dim + normalised)
        window = min(window_size, side)
        padded = math.ceil(side / window) * window
        stages.append(
            Blocks(
                depth=depth,
                num_tokens=side**2,
                embed_dim=dim,
                hidden_dim=hidden_dim,
                num_heads=heads,
                num_queries=padded**2,
                keys_a_query=window**2,
                window_side=window,
                cosine=version == 2,
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
    num_heads: Sequence[int],
    hidden_dims: Sequence[int],
    sr_ratios: Sequence[int],
) -> Network:
    """A pyramid vision transformer, version 2: overlapping patches, keys and values of maps that are shrunk by
    sr_ratios on each side, a depthwise convolution in each MLP; hidden_dims: of the stages' MLPs.
    """
    side, channels = image_size, CHANNELS
    other_flops, other, kept = 0.0, 0, float(image_size**2 * CHANNELS)
    stages = []
    for stage, (dim, depth, heads, hidden_dim, sr_ratio) in enumerate(
        zip(embed_dims, depths, num_heads, hidden_dims, sr_ratios, strict=True)
    ):
        kernel, stride = (3, 2) if stage else (7, 4)
        side = (side + 2 * (kernel // 2) - kernel) // stride + 1
        other_flops += 2.0 * side**2 * channels * kernel**2 * dim
        other += linear(channels * kernel**2, dim) + 2 * dim + 2 * dim  # the stage's last norm, too
        kept += 3.0 * side**2 * dim  # what goes into the patches' norm, and into and out of the stage's
        stages.append(
            Blocks(
                depth=depth,
                num_tokens=side**2,
                embed_dim=dim,
                hidden_dim=hidden_dim,
                num_heads=heads,
                num_key_tokens=(side // sr_ratio) ** 2,
                sr_ratio=sr_ratio,
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
