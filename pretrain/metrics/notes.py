"""The longer sentences that a run says on the terminal. Called by reporter.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEW_LANES = 64  # fewer mix a batch from few places


def start_note(
    *,
    step: int,
    total_steps: int,
    world_size: int,
    zero_stage: int,
    lanes: int,
    resumed: bool,
    init_ignored: bool,
    previous: Mapping[str, int],
) -> str:
    """Where a run begins, and on what. previous: world_size and zero_stage of the checkpoint, where there is one."""
    ranks = _ranks(world_size, zero_stage)
    steps = f"step {step} of {total_steps}" if resumed else f"{total_steps} steps"
    note = f"going on at {steps} on {ranks}" if resumed else f"{steps} on {ranks}"
    if lanes < FEW_LANES:
        note += f"; the order has {lanes} lanes, {FEW_LANES} or more mix a batch better"
    if init_ignored:
        note += "; init_from is ignored, the run has a checkpoint of its own"
    was = {name: previous[name] for name in ("world_size", "zero_stage") if name in previous}
    if was and was != {"world_size": world_size, "zero_stage": zero_stage}:
        note += f"; the checkpoint is of {_ranks(**was)}"
    return note


def changed_note(changed: Mapping[str, Mapping[str, Any]]) -> str:
    """changed: {key: {"before": …, "now": …}}."""
    said = "\n".join(f"  {key}: {of['before']!r} -> {of['now']!r}" for key, of in changed.items())
    return f"changed since the checkpoint:\n{said}"


def slow_rank_note(
    step: int, rank: int, host: str, *, is_slow: bool, seconds: float, others_seconds: float
) -> str:
    what = "is slow: it computes for" if is_slow else "is slow no more: it computes for"
    return (
        f"step {step}: rank {rank} on host {host} {what} {seconds:.3f} s a step before it exchanges "
        f"gradients, the middle rank for {others_seconds:.3f} s"
    )


def _ranks(world_size: int, zero_stage: int) -> str:
    return f"{world_size} rank{'s' if world_size > 1 else ''}, ZeRO {zero_stage}"
