"""Where a run begins: its claim, and the newest checkpoint that every rank can verify.

Called by train.py, all ranks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint.compatibility import changed_keys, check_batch_size, check_resumable
from pretrain.checkpoint.courses import given_up, standing
from pretrain.checkpoint.distrusted import read_distrusted
from pretrain.checkpoint.lineage import read_lineage
from pretrain.checkpoint.load import CheckpointReader, load_fragments, verify_fragments
from pretrain.checkpoint.manifest import Manifest, known, read_manifest
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.mirrored import answered_by_store
from pretrain.checkpoint.restore import here, open_reader, settle_restored
from pretrain.checkpoint.retention import remove_checkpoint
from pretrain.checkpoint.run_directory import RunDirectory, finished_step, stopped_early, unmark_finished
from pretrain.checkpoint.staging import remove_torn_saves, set_aside
from pretrain.config.load import with_defaults
from pretrain.distributed import World, from_main, together
from pretrain.engine.base import Engine, parameter_shapes
from pretrain.errors import CheckpointError, CheckpointMismatchError, UsageError


def claim(run_dir: Path, stack: ExitStack, mirror: Mirror | None = None) -> int:
    """Take the run's folder for this attempt, on rank 0, until `stack` is closed. Returns the attempt's number.

    Raises UsageError when the folder is not to be had, or another process has the run's mirror.
    """
    taken = list(answered_by_store(mirror.attempts)) if mirror else []
    # A folder that was copied without attempts/ would count from 1 again, and its saves for those that are distrusted.
    taken += [one.attempt for one in read_distrusted(run_dir)]
    run = RunDirectory.claim(run_dir, taken=taken)
    stack.callback(run.close)
    if mirror is not None:
        answered_by_store(lambda: mirror.claim(run.attempt))
    try:
        unmark_finished(run_dir)  # it was the end of a shorter run
        remove_torn_saves(run_dir)
    except OSError as error:
        raise UsageError(
            f"run_dir={run_dir}: what an unfinished save left cannot be removed: {error}; check the disk"
        ) from None
    return run.attempt


def has_checkpoint(run_dir: Path) -> bool:
    """Is there a checkpoint, sound or not, of the course that the run is on?

    Raises CheckpointError for a fork without any: what it began with is lost, and it must not begin from nothing.
    """
    if standing(run_dir):
        return True
    if (lineage := read_lineage(run_dir)) is not None:
        raise CheckpointError(
            f"{run_dir}: is a fork of {lineage.parent} at step {lineage.step}, and has neither the checkpoint that it "
            f"began with nor one of its own; fork it again: pretrain fork {lineage.parent}@{lineage.step} NEW …"
        )
    return False


def remove(folders: Sequence[Path], mirror: Mirror | None) -> None:
    """Of a course that was given up: here, and where they would come back from. Raises PretrainError."""
    for folder in folders:
        if mirror is not None:
            answered_by_store(lambda folder=folder: mirror.remove(folder))  # type: ignore[misc]
        remove_checkpoint(folder)


def is_finished(run_dir: Path, last_step: int, *, may_stop_early: bool = False, **identity: Any) -> bool:
    """Has this very run reached `last_step`, or stopped early where it may?

    Raises CheckpointMismatchError when another one has there.
    """
    done = finished_step(run_dir)
    if done is None or (done < last_step and not (may_stop_early and stopped_early(run_dir))):
        return False
    folders = standing(run_dir)
    if folders:
        manifest = read_manifest(folders[-1])
        _check_same_run(manifest, identity, parameters=manifest.parameters, where=str(folders[-1]))
    return True


def _check_same_run(
    manifest: Manifest, identity: Mapping[str, Any], *, parameters: Mapping[str, list[int]], where: str
) -> None:
    # A key that came after the checkpoint was written: the run trained as its default says, for that is "off".
    manifest = replace(manifest, config=with_defaults(manifest.config))
    check_resumable(manifest, **identity, parameters=parameters, where=where)


def changed_since(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `config` has changed since that checkpoint, of what may change: {key: {"before": …, "now": …}}."""
    return changed_keys(with_defaults(manifest.config), config)


def resume(
    run_dir: Path,
    engine: Engine,
    *,
    world: World,
    identity: Mapping[str, Any],
    global_batch_size: int,
    on_rejected: Callable[[Path, CheckpointError], None],
    mirror: Mirror | None = None,
) -> Manifest | None:
    """Load the newest checkpoint that all ranks verify into `engine`; None when the run has none.

    `identity`: the run's config, dataset and order, which must be the checkpoint's. Those of a course that was
    given up do not count, and are removed once there is something to go on from. Checkpoints that
    were passed over are taken out of the listing, and `on_rejected` hears of each. Raises
    CheckpointMismatchError when one is of another run, and CheckpointError when there are checkpoints
    and none can be trusted; then all stay where they are.
    """
    left = from_main(world, lambda: given_up(run_dir))
    folders = [folder for folder in from_main(world, lambda: known(run_dir)) if folder not in left]
    parameters = parameter_shapes(engine.module)
    rejected: list[tuple[Path, CheckpointError]] = []

    def verified(folder: Path, save_id: str) -> CheckpointReader:
        reader = open_reader(folder, mirror, save_id=save_id)
        _check_same_run(reader.manifest, identity, parameters=parameters, where=str(folder))
        check_batch_size(reader.manifest, global_batch_size, where=str(folder))
        verify_fragments(reader, engine.fragments())
        return reader

    for folder in reversed(folders):
        try:
            save_id = from_main(world, lambda folder=folder: read_manifest(here(folder)).save_id)  # type: ignore[misc]
            reader = together(lambda folder=folder, save_id=save_id: verified(folder, save_id))  # type: ignore[misc]
        except CheckpointMismatchError:
            raise
        except CheckpointError as error:
            on_rejected(folder, error)
            rejected.append((folder, error))
            continue
        load_fragments(reader, engine.fragments())
        engine.optimizer_steps = reader.manifest.optimizer_steps
        engine.publish_weights()
        from_main(world, lambda: _reject([folder for folder, _ in rejected], mirror))
        from_main(world, lambda: remove(left, mirror))
        settle_restored(run_dir, world=world)
        return reader.manifest
    if rejected:
        raise CheckpointError(
            f"{run_dir}: none of its {len(folders)} checkpoints can be trusted, the reasons are above; bring one "
            f"back from a copy, or start anew with another run_dir; the oldest: {rejected[-1][1]}"
        )
    from_main(world, lambda: remove(left, mirror))
    return None


def _reject(folders: list[Path], mirror: Mirror | None) -> None:
    for folder in folders:
        if mirror is not None:
            answered_by_store(lambda folder=folder: mirror.set_aside(folder))  # type: ignore[misc]
    set_aside(folders)
