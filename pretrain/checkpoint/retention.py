"""Which checkpoints stay, and whether there is room for another. Called by writer.py and `pretrain checkpoints`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from pretrain.checkpoint.best import best_step
from pretrain.checkpoint.manifest import known
from pretrain.checkpoint.staging import STAGING_SUFFIX
from pretrain.errors import PretrainError

_LEFT_FREE_BYTES = 64 << 10  # for the journal and the records of how ranks end


def kept_steps(
    steps: Collection[int],
    *,
    keep_last: int,
    keep_every_steps: int | None,
    reach_steps: int = 0,
    best: int | None = None,
) -> set[int]:
    """The newest `keep_last` of `steps`, those that `keep_every_steps` divides, and the `best` one.

    reach_steps: how many steps a fault may lead back that is found after the newest of them. The newest from before
    those stays, too, for several saves may follow each other closely, as those of preemptions do; and the oldest
    beyond it, which will take its place.
    """
    kept = set(sorted(steps, reverse=True)[:keep_last])
    if reach_steps and steps:
        lowest = max(steps) + 1 - reach_steps
        kept |= set(sorted(step for step in steps if step <= lowest)[-1:])
        kept |= set(sorted(step for step in steps if step > lowest)[:1])
    if keep_every_steps is not None:
        kept |= {step for step in steps if step % keep_every_steps == 0}
    return kept | {step for step in steps if step == best}


def retain(
    run_dir: Path, *, keep_last: int, keep_every_steps: int | None, reach_steps: int = 0
) -> list[Path]:
    """Remove the checkpoints that need not stay. Returns them. Raises PretrainError when one cannot go."""
    by_step = {step_of(folder): folder for folder in known(run_dir)}
    kept = kept_steps(
        by_step,
        keep_last=keep_last,
        keep_every_steps=keep_every_steps,
        reach_steps=reach_steps,
        best=best_step(run_dir, by_step),
    )
    removed = [folder for step, folder in sorted(by_step.items()) if step not in kept]
    for folder in removed:
        remove_checkpoint(folder)
    return removed


def remove_checkpoint(folder: Path) -> None:
    """Unlisted first: a kill in mid-removal must leave none half listed. Raises PretrainError."""
    doomed = folder.with_name(f"{folder.name}.old{STAGING_SUFFIX}")
    try:
        if doomed.exists():
            shutil.rmtree(doomed)
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise PretrainError(
            f"{folder}: cannot be removed: {error}; check the disk and its permissions"
        ) from None


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2].partition(".")[0])


def check_space(run_dir: Path, needed_bytes: int) -> None:
    """Raises PretrainError when the disk has no room for so much: better before than after gigabytes of it."""
    disk = os.statvfs(run_dir)
    free = disk.f_bavail * disk.f_frsize
    if free < needed_bytes + _LEFT_FREE_BYTES:
        raise PretrainError(
            f"{run_dir}: No space left on device for a checkpoint of {needed_bytes / 1e6:,.1f} MB, "
            f"{free / 1e6:,.1f} MB are free; free space, or set run_dir elsewhere"
        )
