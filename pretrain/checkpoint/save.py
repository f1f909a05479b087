"""Write a checkpoint and wait for it, in this process: what saver.py does beside training.

Called by tools that make a checkpoint without training, and by the benchmark that compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.manifest import CHECKPOINTS, step_folder
from pretrain.checkpoint.retention import retain
from pretrain.checkpoint.snapshot import pieces_of
from pretrain.checkpoint.staging import commit, finished_parts, manifest_of, staging_folder, write_part
from pretrain.distributed import World, from_main, together
from pretrain.engine.fragments import Fragment


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    path: Path
    bytes: int


def save_checkpoint(
    run_dir: Path,
    fragments: list[Fragment],
    *,
    world: World,
    keep_last: int,
    facts: dict[str, Any],
) -> SavedCheckpoint:
    """Commit a checkpoint of `fragments`, this rank's part of the state. All ranks together.

    `facts` are the manifest's fields other than `files`. On return the checkpoint is durable and
    listed, and all but the newest `keep_last` are gone. Raises PretrainError on every rank when
    one could not write its part; then nothing is listed that was not before.
    """
    save_id = f"{facts['attempt']}-0"
    final = Path(run_dir) / CHECKPOINTS / step_folder(facts["step"])
    staging = staging_folder(run_dir, facts["step"], save_id)
    together(lambda: write_part(staging, world.rank, pieces_of(fragments), _bytes_of(fragments)))

    def publish() -> int:
        parts = finished_parts(staging, world.world_size)
        commit(staging, final, manifest_of(parts, {**facts, "save_id": save_id}, staging))
        retain(run_dir, keep_last=keep_last, keep_every_steps=None)
        return sum(part.size_bytes for part in parts.values())

    return SavedCheckpoint(path=final, bytes=from_main(world, publish))


def _bytes_of(fragments: list[Fragment]) -> memoryview:
    tensors = [
        tensor.detach().cpu().float().numpy()
        for fragment in fragments
        for tensor in fragment.tensors.values()
    ]
    return np.concatenate([*tensors, np.empty(0, np.float32)]).view(np.uint8).data
