"""Learning rates as functions of the step. Called by train.py and fork.py, which get them from derived.py."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine_lr(step: int, *, peak: float, warmup_steps: int, total_steps: int, min_lr: float = 0.0) -> float:
    """The rate of optimizer step `step` (the first is 0): linear warmup from 0, then half a cosine.

    peak · step / warmup_steps before `warmup_steps`, `peak` at it, `min_lr` from `total_steps` on
    (arXiv:1608.03983, without restarts). Raises ValueError for negative steps.
    """
    if step < 0 or warmup_steps < 0 or total_steps < 0:
        raise ValueError(f"negative step: {step=}, {warmup_steps=}, {total_steps=}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return min_lr
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant_lr(step: int, *, peak: float, warmup_steps: int) -> float:
    """Linear warmup from 0, then `peak` for good. Raises ValueError for negative steps."""
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"negative step: {step=}, {warmup_steps=}")
    return peak * step / warmup_steps if step < warmup_steps else peak


def rsqrt_lr(step: int, *, peak: float, warmup_steps: int, timescale_steps: int) -> float:
    """Linear warmup from 0, then peak / sqrt(1 + (step - warmup_steps) / timescale_steps).

    The reciprocal square root of "Scaling Vision Transformers" (arXiv:2106.04560) as big_vision computes it, without
    its shift: at the peak after the warmup, at half of it three timescales later. Raises ValueError for
    negative steps.
    """
    if step < 0 or warmup_steps < 0 or timescale_steps <= 0:
        raise ValueError(f"negative step: {step=}, {warmup_steps=}, {timescale_steps=}")
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak / math.sqrt(1.0 + (step - warmup_steps) / timescale_steps)


def scaled_lr(base_lr: float, global_batch_size: int) -> float:
    """The linear scaling rule (arXiv:1706.02677): `base_lr` is for 256 images a step."""
    return base_lr * global_batch_size / 256


def cooled_down(
    lr_of: Callable[[int], float],
    *,
    cooldown_steps: int,
    total_steps: int,
    min_lr: float = 0.0,
    follow: bool = False,
) -> Callable[[int], float]:
    """`lr_of`, but over the last `cooldown_steps` straight from where it is then to `min_lr` at `total_steps`.

    follow: not from where it is when the cooldown begins, but from where it would be at each step: `lr_of` goes on and
    is multiplied by what is left of the cooldown, as big_vision does with its reciprocal square root
    (arXiv:2106.04560). Raises ValueError when there are not so many steps.
    """
    if not 0 <= cooldown_steps <= total_steps:
        raise ValueError(f"a cooldown of {cooldown_steps} steps in a run of {total_steps}")
    begin = total_steps - cooldown_steps

    def lr(step: int) -> float:
        if step < begin or not cooldown_steps:
            return lr_of(step)
        left = max(0.0, (total_steps - step) / cooldown_steps)
        return min_lr + (lr_of(step if follow else begin) - min_lr) * left

    return lr
