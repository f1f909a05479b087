"""Stochastic depth (arXiv:1603.09382), keyed by (seed, position). Called by the backbones.

Two forms. Per sample, every branch is computed and then scaled by 0 or 1 / (1 - rate): which are dropped depends on
the sample alone. Batch subset (DINOv2, arXiv:2304.07193) computes a branch for a part of the batch only and so
saves its work: which samples are kept depends on who else is in the micro-batch. It is the same in expectation,
and not the same for another micro-batch size or number of ranks.
"""

# B batch, L blocks, S samples kept

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.keyed_random import DROP_PATH, keyed_uniform
from pretrain.models.drop_rates import SUBSET_FROM_RATE, drop_rates


def branch_scales(sample_keys_B: Tensor | None, *, rate: float, depth: int, dtype: torch.dtype) -> Tensor:
    """(B, L, 2): 0 for a residual branch that is dropped, 1 / keep rate otherwise."""
    assert sample_keys_B is not None, "stochastic depth needs sample_keys in training"
    draw = keyed_uniform(sample_keys_B, DROP_PATH, 2 * depth)
    block = torch.arange(2 * depth, device=draw.device) // 2
    keep = 1.0 - rate * block / max(depth - 1, 1)
    scale = torch.where(draw < keep, 1.0 / keep, 0.0)
    return scale.unflatten(1, (depth, 2)).to(dtype)


def scales_by_stage(
    sample_keys_B: Tensor | None, *, rate: float, depths: Sequence[int], dtype: torch.dtype
) -> list[Tensor | None]:
    """`branch_scales` of all blocks, (B, L, 2) for the L of each stage; None for each where nothing is dropped."""
    if rate == 0.0:
        return [None] * len(depths)
    scales = branch_scales(sample_keys_B, rate=rate, depth=sum(depths), dtype=dtype)
    return list(scales.split(list(depths), dim=1))


def scaled(branch: Tensor, branch_scale_B2: Tensor | None, which: int) -> Tensor:
    """A block's residual branch (B, …), 0 for attention and 1 for the MLP, times its scale; None keeps it as it is."""
    if branch_scale_B2 is None:
        return branch
    return branch * branch_scale_B2[:, which].view(-1, *[1] * (branch.ndim - 1))


def kept_subsets(sample_keys_B: Tensor | None, *, rate: float, depth: int) -> list[Tensor | None]:
    """For each block the samples whose branches are computed, int64 (2, S), or None where its rate is too low.

    S is B · (1 - the block's rate), rounded down and at least 1: known without looking at the draws.
    """
    assert sample_keys_B is not None, "stochastic depth needs sample_keys in training"
    # stable: ties (pads have one key) break alike on every device
    order = keyed_uniform(sample_keys_B, DROP_PATH, 2 * depth).argsort(dim=0, stable=True)
    kept: list[Tensor | None] = []
    for block, drop in enumerate(drop_rates(rate, depth)):
        # 10 · (1 - 0.9) is 0.99… in binary, and means 1
        count = max(int(len(order) * (1.0 - drop) + 1e-6), 1)
        kept.append(order[:count, 2 * block : 2 * block + 2].T if drop > SUBSET_FROM_RATE else None)
    return kept
