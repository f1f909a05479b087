"""Go back to a checkpoint within the process, after a `Fault`. Called by train.py, all ranks together.

What is to be jumped over, or not to be trusted, is committed first, by rank 0, and only then does anybody act: a run
that is killed in between finds the list when it is started again, and goes back as this would have done. It is written
while no writer can list a checkpoint; one that comes to it later finds the list, and lists nothing of the course.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pretrain.assemble_data import Data
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


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """The way back of one attempt of a run. on_rejected: hears of each checkpoint that is passed over."""

    run_dir: Path
    engine: Engine
    world: World
    attempt: int
    global_batch_size: int
    mirror: Mirror | None
    saver: Saver
    on_rejected: Callable[[Path, CheckpointError], None]

    def distrust(self, fault: Fault, data: Data, *, samples: int) -> None:
        """Trust no save any more of the steps that `fault` came from, and remove those that there are.

        Before it is asked whether the run may go back once more: nobody who starts it again may begin from them.
        `samples` is where the run is.
        """
        start = from_main(self.world, lambda: self.first_position(fault, data, samples=samples))

        def commit() -> None:
            one = Distrusted(
                beyond=start,
                attempt=self.attempt,
                saves=self.saver.saves,
                reason=fault.reason,
                time=time.time(),
            )
            write_distrusted(self.run_dir, distrusting(read_distrusted(self.run_dir), [one]))

        try:
            from_main(self.world, lambda: self._owned(commit))
        except UsageError:  # another attempt has the run: what is there is not ours to judge
            raise
        except (
            PretrainError
        ):  # a full disk, a store that is away: without the checkpoints nobody needs the list
            self._remove_saves(beyond=start)
            raise
        self._remove_saves(beyond=start)

    def go_back(
        self, fault: Fault, data: Data, *, samples: int, identity: Mapping[str, Any]
    ) -> tuple[Manifest, Data]:
        """Load the newest checkpoint from before the steps that `fault` came from; `samples` is where the run is.

        Returns that checkpoint's manifest, and the data with what is jumped over from now on. Newer checkpoints are
        removed, and a save of them that is under way is given up: they are of a course that was. identity: as `resume`
        takes it. Raises PretrainError when there is none from before; then the run, started again, begins anew.
        """
        start = from_main(self.world, lambda: self.first_position(fault, data, samples=samples))

        def skip() -> tuple[Skipped, ...]:
            one = Skipped(
                start=start, stop=samples, reason=fault.reason, attempt=self.attempt, time=time.time()
            )
            skipped = adding(read_skipped(self.run_dir), one)
            write_skipped(self.run_dir, skipped)
            return skipped

        if fault.skip:
            data = data.skipping(from_main(self.world, lambda: self._owned(skip)))
        self._remove_saves(beyond=start)
        manifest = resume(
            self.run_dir,
            self.engine,
            world=self.world,
            identity={**identity, "skipped": data.skipped},
            global_batch_size=self.global_batch_size,
            on_rejected=self.on_rejected,
            mirror=self.mirror,
        )
        if manifest is None:
            from_main(self.world, lambda: has_checkpoint(self.run_dir))  # which says what to do with a fork
            raise PretrainError(
                f"{fault.reason}; the run has no checkpoint from before it to go back to: started again it begins anew"
                f"{', without those samples' if fault.skip else ''}; if that does not help, {ADVICE}"
            )
        mirror = self.mirror
        if mirror is not None:
            from_main(self.world, lambda: answered_by_store(lambda: mirror.remove_newer(manifest.step)))
        together(lambda: data.require_from(manifest.samples))
        return manifest, data

    def first_position(self, fault: Fault, data: Data, *, samples: int) -> int:
        """Where the steps begin that a fault found at position `samples` came from. On rank 0.

        Where all of the run's checkpoints have consumed some of these steps it is where the oldest stands: a fork, or a
        run that goes back again, has none from before, and giving up its last one would lose all that it has learned.
        Not so when ranks differ: then those checkpoints may hold what is wrong.
        """
        consumed = int(data.stream.skips.consumed(samples)) - fault.steps * self.global_batch_size
        start = int(data.stream.skips.position_of(max(0, consumed)))
        if fault.kind == "replica":
            return start
        held = []
        for folder in standing(self.run_dir):
            try:
                held.append(read_manifest(folder).samples)
            except CheckpointError:  # damaged, or removed for newer ones
                continue
        return max(start, min(held, default=start))

    def _owned(self, write: Callable[[], T]) -> T:
        """What `write` returns, which changes the run's lists: here, and then in the mirror. Meanwhile no writer lists
        a checkpoint, nor does it bring the mirror what the lists were before.

        Raises UsageError when a newer attempt has the run.
        """
        mirror = self.mirror
        with only_newest_attempt(self.run_dir, self.attempt):
            if mirror is None:
                return write()
            answered_by_store(lambda: mirror.require_newest(self.attempt))
            written = write()
            answered_by_store(lambda: mirror.push_lists(self.run_dir))
            return written

    def _remove_saves(self, *, beyond: int) -> None:
        """Give up the save that is under way, and remove the checkpoints of courses that were given up and those beyond
        a position, on all hosts and in the mirror.
        """
        self.saver.leave(beyond=beyond)

        def of_main() -> set[int]:
            with only_newest_attempt(self.run_dir, self.attempt):
                folders = given_up(self.run_dir, beyond=beyond)
                remove(folders, self.mirror)
            return {step_of(folder) for folder in folders}

        steps = from_main(self.world, of_main)

        def of_host() -> None:  # with a disk of its own; where all share one there are none left
            if self.world.local_rank == 0 and not self.world.is_main:
                for folder in known(self.run_dir):
                    if step_of(folder) in steps:
                        remove_checkpoint(folder)

        if self.mirror is not None:
            together(of_host)
