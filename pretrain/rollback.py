"""Go back to a checkpoint within the process, after a `Fault`. Called by train.py, all ranks together.

What is to be jumped over, or not to be trusted, is committed first, by rank 0, and only then does anybody act: a run
that is killed in between finds the list when it is started again, and goes back as this would have done. It is written
while no writer can list a checkpoint; one that comes to it later finds the list, and lists nothing of the course.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pretrain.assemble import Data
from pretrain.checkpoint.courses import given_up, standing
from pretrain.checkpoint.distrusted import Distrusted, distrusting, read_distrusted, write_distrusted
from pretrain.checkpoint.manifest import Manifest, known, read_manifest
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.mirrored import answered_by_store
from pretrain.checkpoint.retention import remove_checkpoint, step_of
from pretrain.checkpoint.run_directory import only_newest_attempt
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.skipped import Skipped, adding, read_skipped, write_skipped
from pretrain.distributed import World, from_main, together
from pretrain.engine.base import Engine
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.judge import ADVICE, Fault
from pretrain.resume import has_checkpoint, remove, resume

T = TypeVar("T")


def first_position(fault: Fault, run_dir: Path, data: Data, *, samples: int, global_batch_size: int) -> int:
    """Where the steps begin that a fault found at position `samples` came from. On rank 0.

    Where all of the run's checkpoints have consumed some of these steps it is where the oldest stands: a fork, or a run
    that goes back again, has none from before, and giving up its last one would lose all that it has learned. Not so
    when ranks differ: then those checkpoints may hold what is wrong.
    """
    consumed = int(data.stream.skips.consumed(samples)) - fault.steps * global_batch_size
    start = int(data.stream.skips.position_of(max(0, consumed)))
    if fault.kind == "replica":
        return start
    held = []
    for folder in standing(run_dir):
        try:
            held.append(read_manifest(folder).samples)
        except CheckpointError:  # damaged, or removed for newer ones
            continue
    return max(start, min(held, default=start))


def distrust(
    fault: Fault,
    run_dir: Path,
    *,
    data: Data,
    samples: int,
    world: World,
    attempt: int,
    global_batch_size: int,
    mirror: Mirror | None,
    saver: Saver,
) -> None:
    """Trust no save any more of the steps that `fault` came from, and remove those that there are.

    Before it is asked whether the run may go back once more: nobody who starts it again may begin from them.
    """
    start = from_main(
        world,
        lambda: first_position(fault, run_dir, data, samples=samples, global_batch_size=global_batch_size),
    )

    def commit() -> None:
        one = Distrusted(
            beyond=start, attempt=attempt, saves=saver.saves, reason=fault.reason, time=time.time()
        )
        write_distrusted(run_dir, distrusting(read_distrusted(run_dir), [one]))

    def remove_all() -> None:
        saver.leave(beyond=start)
        _remove(run_dir, attempt, world=world, mirror=mirror, beyond=start)

    try:
        from_main(world, lambda: _owned(commit, run_dir, attempt, mirror))
    except UsageError:  # another attempt has the run: what is there is not ours to judge
        raise
    except PretrainError:  # a full disk, a store that is away: without the checkpoints nobody needs the list
        remove_all()
        raise
    remove_all()


def go_back(
    fault: Fault,
    run_dir: Path,
    engine: Engine,
    *,
    data: Data,
    samples: int,
    world: World,
    attempt: int,
    identity: Mapping[str, Any],
    global_batch_size: int,
    on_rejected: Callable[[Path, CheckpointError], None],
    mirror: Mirror | None,
    saver: Saver,
) -> tuple[Manifest, Data]:
    """Load the newest checkpoint from before the steps that `fault` came from; `samples` is where the run is.

    Returns that checkpoint's manifest, and the data with what is jumped over from now on. Newer checkpoints are
    removed, and a save of them that is under way is given up: they are of a course that was. Raises PretrainError when
    there is none from before; then the run, started again, begins anew.
    """
    start = from_main(
        world,
        lambda: first_position(fault, run_dir, data, samples=samples, global_batch_size=global_batch_size),
    )

    def skip() -> tuple[Skipped, ...]:
        one = Skipped(start=start, stop=samples, reason=fault.reason, attempt=attempt, time=time.time())
        skipped = adding(read_skipped(run_dir), one)
        write_skipped(run_dir, skipped)
        return skipped

    if fault.skip:
        data = data.skipping(from_main(world, lambda: _owned(skip, run_dir, attempt, mirror)))
    saver.leave(beyond=start)
    _remove(run_dir, attempt, world=world, mirror=mirror, beyond=start)
    manifest = resume(
        run_dir,
        engine,
        world=world,
        identity={**identity, "skipped": data.skipped},
        global_batch_size=global_batch_size,
        on_rejected=on_rejected,
        mirror=mirror,
    )
    if manifest is None:
        from_main(world, lambda: has_checkpoint(run_dir))  # which says what to do with a fork
        raise PretrainError(
            f"{fault.reason}; the run has no checkpoint from before it to go back to: started again it begins anew"
            f"{', without those samples' if fault.skip else ''}; if that does not help, {ADVICE}"
        )
    if mirror is not None:
        from_main(world, lambda: answered_by_store(lambda: mirror.remove_newer(manifest.step)))
    together(lambda: data.require_from(manifest.samples))
    return manifest, data


def _owned(write: Callable[[], T], run_dir: Path, attempt: int, mirror: Mirror | None) -> T:
    """What `write` returns, which changes the run's lists: here, and then in the mirror. Meanwhile no writer lists a
    checkpoint, nor does it bring the mirror what the lists were before.

    Raises UsageError when a newer attempt has the run.
    """
    with only_newest_attempt(run_dir, attempt):
        if mirror is None:
            return write()
        answered_by_store(lambda: mirror.require_newest(attempt))
        written = write()
        answered_by_store(lambda: mirror.push_lists(run_dir))
        return written


def _remove(run_dir: Path, attempt: int, *, world: World, mirror: Mirror | None, beyond: int) -> None:
    """The checkpoints of courses that were given up, and those beyond a position, on all hosts and in the mirror."""

    def of_main() -> set[int]:
        with only_newest_attempt(run_dir, attempt):
            folders = given_up(run_dir, beyond=beyond)
            remove(folders, mirror)
        return {step_of(folder) for folder in folders}

    steps = from_main(world, of_main)

    def of_host() -> None:  # with a disk of its own; where all share one there are none left
        if world.local_rank == 0 and not world.is_main:
            for folder in known(run_dir):
                if step_of(folder) in steps:
                    remove_checkpoint(folder)

    if mirror is not None:
        together(of_host)
