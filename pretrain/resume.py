"""Where a run begins: its claim, and the newest checkpoint that every rank can verify.

Called by train.py, all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.compatibility import check_resumable
from pretrain.checkpoint.load import CheckpointReader, load_fragments, verify_fragments
from pretrain.checkpoint.manifest import Manifest, committed, read_manifest
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.save import remove_torn_saves
from pretrain.distributed import World, from_main, together
from pretrain.engine.base import Engine, parameter_shapes
from pretrain.errors import CheckpointError, CheckpointMismatchError, UsageError


def claim(run_dir: Path, held: list[RunDirectory]) -> int:
    """Take the run's folder for this attempt, on rank 0. Returns the attempt's number.

    The hold goes into `held`, to be closed at the end. Raises UsageError when the folder is not to be had.
    """
    run = RunDirectory.claim(run_dir)
    held.append(run)
    try:
        remove_torn_saves(run_dir)
    except OSError as error:
        raise UsageError(
            f"run_dir={run_dir}: what an unfinished save left cannot be removed: {error}; check the disk"
        ) from None
    return run.attempt


def has_checkpoint(run_dir: Path) -> bool:
    return bool(committed(run_dir))


def stored_lanes(run_dir: Path) -> int | None:
    """The lanes that the run was created with, None for a new run."""
    for folder in reversed(committed(run_dir)):
        try:
            return int(read_manifest(folder).order["lanes"])
        except CheckpointError:  # the one before it may be sound; resume() says which was not
            continue
    return None


def resume(
    run_dir: Path,
    engine: Engine,
    *,
    world: World,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    order: Mapping[str, Any],
    global_batch_size: int,
    on_rejected: Callable[[Path, CheckpointError], None],
) -> Manifest | None:
    """Load the newest checkpoint that all ranks verify into `engine`; None when the run has none.

    Raises CheckpointMismatchError when it is of another run, and CheckpointError when there are
    checkpoints and none can be trusted. `on_rejected` hears of each that was passed over.
    """
    folders = from_main(world, lambda: committed(run_dir))
    parameters = parameter_shapes(engine.module)
    last_error: CheckpointError | None = None

    def verified(folder: Path) -> CheckpointReader:
        reader = CheckpointReader(folder)
        check_resumable(
            reader.manifest,
            config=config,
            dataset=dataset,
            order=order,
            parameters=parameters,
            global_batch_size=global_batch_size,
            where=str(folder),
        )
        verify_fragments(reader, engine.fragments())
        return reader

    for folder in reversed(folders):
        try:
            reader = together(lambda folder=folder: verified(folder))  # type: ignore[misc]
        except CheckpointMismatchError:
            raise
        except CheckpointError as error:
            on_rejected(folder, error)
            last_error = error
            continue
        load_fragments(reader, engine.fragments())
        engine.optimizer_steps = reader.manifest.optimizer_steps
        engine.publish_weights()
        return reader.manifest
    if last_error is not None:
        raise CheckpointError(
            f"{run_dir}: none of its {len(folders)} checkpoints can be trusted, the reasons are above; bring one "
            f"back from a copy, or start anew with another run_dir; the oldest: {last_error}"
        )
    return None
