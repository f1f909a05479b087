"""What a rank holds of a network and its optimizer, by arithmetic: a model, not a measurement. Called by dry runs.

After ZeRO (arXiv:1910.02054, figure 1), as DeepSpeed 0.19 has it. Left out: buffers of collectives, the
allocator's rounding and fragments, what libraries keep for themselves; some gigabytes on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.metrics.blocks import FLOAT32_BYTES

# Muon has one of matrices, and two of what is no matrix: the upper bound
MOMENTS = {"adamw": 2, "lamb": 2, "muon": 2}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float  # float32 masters and moments
    ema: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema


def state_bytes(
    parameters: int,
    *,
    stage: int,
    world_size: int,
    bf16: bool,
    accumulates: bool = False,
    optimizer: str = "adamw",
    ema: bool = False,
) -> StateBytes:
    """Of `parameters` trained ones at a ZeRO stage. accumulates: several micro-batches a step, whose gradients add up
    in float32. Masters, moments and the EMA are float32, cut over the ranks from stage 1 on.
    """
    low = 2 if bf16 else FLOAT32_BYTES
    shards = world_size if stage >= 1 else 1
    # In float32 at stage 0 the weights are their own masters.
    masters = 0 if stage == 0 and not bf16 else FLOAT32_BYTES
    moments = MOMENTS[optimizer] * FLOAT32_BYTES
    part = parameters / world_size if stage >= 2 else parameters  # whose gradients a rank keeps
    gradients = part * low
    if accumulates and bf16:  # stage 3 adds up at once, the others when a micro-batch is done
        gradients = part * (FLOAT32_BYTES + (low if stage < 3 else 0))
    elif accumulates and stage == 2:  # so far, and of this micro-batch
        gradients += part * low
    return StateBytes(
        weights=parameters * low / (world_size if stage >= 3 else 1),
        gradients=gradients,
        optimizer=parameters * (masters + moments) / shards,
        ema=parameters * FLOAT32_BYTES / shards if ema else 0.0,
    )
