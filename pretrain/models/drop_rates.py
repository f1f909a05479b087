"""The rates of stochastic depth by block. Called by drop_path.py and by dry runs; knows no torch."""

from __future__ import annotations

# Batch-subset stochastic depth computes all of a block that is dropped more rarely: below DINOv2's rate, picking the
# samples costs what it saves.
SUBSET_FROM_RATE = 0.1


def drop_rates(rate: float, depth: int) -> list[float]:
    """The rate of each block: linear from 0 to `rate` at the last."""
    return [rate * block / max(depth - 1, 1) for block in range(depth)]


def computed_share(*, rate: float, depth: int, mode: str) -> float:
    """The share of residual branches that is computed: all of them, unless the mode is "batch_subset"."""
    if mode != "batch_subset":
        return 1.0
    return sum(1.0 - (drop if drop > SUBSET_FROM_RATE else 0.0) for drop in drop_rates(rate, depth)) / depth
