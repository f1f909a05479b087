"""Learning rates as functions of the step. Called by train.py, which gets them from assemble.py."""

from __future__ import annotations

import math


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
