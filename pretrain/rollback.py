"""Go back to a checkpoint within the process, after a `Fault`. Called by train.py, all ranks together.

What is to be jumped over is committed first, by rank 0, and only then does anybody act: a run that is killed in
between finds the list when it is started again, and goes back as this would have done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.assemble import Data
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.restore import answered_by_store
from pretrain.checkpoint.skipped import Skipped, adding, read_skipped, write_skipped
from pretrain.distributed import World, from_main, together
from pretrain.engine.base import Engine
from pretrain.errors import CheckpointError, PretrainError
from pretrain.judge import ADVICE, Fault
from pretrain.resume import given_up, remove, resume


def first_position(fault: Fault, data: Data, *, samples: int, global_batch_size: int) -> int:
    """Where the steps begin that a fault found at position `samples` came from."""
    consumed = int(data.stream.skips.consumed(samples)) - fault.steps * global_batch_size
    return int(data.stream.skips.position_of(max(0, consumed)))


def distrust(
    fault: Fault,
    run_dir: Path,
    *,
    data: Data,
    samples: int,
    world: World,
    global_batch_size: int,
    mirror: Mirror | None,
) -> None:
    """Remove the checkpoints of the steps that `fault` came from. No save may be under way.

    Before it is asked whether the run may go back once more: nobody who starts it again may begin from them.
    """
    start = first_position(fault, data, samples=samples, global_batch_size=global_batch_size)
    from_main(world, lambda: remove(given_up(run_dir, data.skipped, beyond=start), mirror))


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
) -> tuple[Manifest, Data]:
    """Load the newest checkpoint from before the steps that `fault` came from; `samples` is where the run is.
    No save may be under way.

    Returns that checkpoint's manifest, and the data with what is jumped over from now on. Newer checkpoints are
    removed: they are of a course that was given up. Raises PretrainError when there is none from before; then the
    run, started again, begins anew.
    """
    start = first_position(fault, data, samples=samples, global_batch_size=global_batch_size)
    if fault.skip:
        data = data.skipping(
            from_main(world, lambda: _commit(fault, run_dir, start, samples, attempt, mirror))
        )
    from_main(world, lambda: remove(given_up(run_dir, data.skipped, beyond=start), mirror))
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
        raise PretrainError(
            f"{fault.reason}; the run has no checkpoint from before it to go back to: started again it begins anew"
            f"{', without those samples' if fault.skip else ''}; if that does not help, {ADVICE}"
        )
    together(lambda: data.require_from(manifest.samples))
    return manifest, data


def _commit(
    fault: Fault, run_dir: Path, start: int, stop: int, attempt: int, mirror: Mirror | None
) -> tuple[Skipped, ...]:
    """Have the run skip the positions [start, stop) for good. Returns all that it skips."""
    one = Skipped(start=start, stop=stop, reason=fault.reason, attempt=attempt, time=time.time())
    skipped = adding(read_skipped(run_dir), one)
    write_skipped(run_dir, skipped)
    if mirror is not None:
        answered_by_store(lambda: mirror.push(run_dir, rank=0))
    return skipped
