"""What tests of mirrored runs begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from held_state import ALONE, HeldState, make_saver

from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.restore import bring_back
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.saver import Saver
from pretrain.distributed import World
from pretrain.storage import RetryPolicy, S3Settings

SHAPES = {"w": [1_000_000], "b": [7]}  # 12 MB: more than two parts
QUICK = S3Settings(
    read_timeout_seconds=0.5,
    part_bytes=5 << 20,
    retry=RetryPolicy(attempts=6, seconds=20.0, first_delay_seconds=0.01, longest_delay_seconds=0.1),
)


def begin(run_dir: Path, mirror: Mirror, world: World = ALONE, **settings: Any) -> tuple[Saver, HeldState]:
    """An attempt of the run, up to its saver."""
    bring_back(run_dir, mirror, world=ALONE)
    if world.is_main:
        claimed = RunDirectory.claim(run_dir, taken=mirror.attempts())
        claimed.close()
        mirror.claim(claimed.attempt)
        settings = {"attempt": claimed.attempt, **settings}
    state = HeldState(SHAPES, rank=world.rank, world_size=world.world_size)
    return make_saver(run_dir, state, world=world, mirror=mirror, **settings), state
