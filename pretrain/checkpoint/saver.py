"""Save checkpoints beside training: copy the state, and leave the rest to a process of its own. Used by train.py.

Every rank has a `Saver`, and it a process that writes (writer_process.py, writer.py). A save stops training for the
copy alone. What a writer could not do is known at the next step: ranks sum `failed()` with the step's other numbers,
and `settle` gives the save up everywhere. A save of which one rank's part is missing is never committed.
A writer that does not answer while training waits for it, an interval later, is named; one that was stopped is ended.

Journal: `checkpoint` (committed), `checkpoint_failed` (step, reasons, in_a_row).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pretrain.checkpoint.manifest import CHECKPOINTS, mirrored_folder, read_manifest, step_folder
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.snapshot import Snapshot
from pretrain.checkpoint.staging import staging_folder
from pretrain.checkpoint.writer_process import WriterProcess
from pretrain.distributed import World, gather_objects, sum_over_ranks
from pretrain.engine.base import Engine, parameter_shapes
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.metrics.reporter import Reporter

_LAST_SECONDS = 5.0  # for a save that is under way when the process has to end
_PATIENCE_SECONDS = 10.0  # for a writer that training waits for, until somebody looks what ails it


@dataclass(kw_only=True)
class _Save:
    """A save from its order on."""

    id: str
    step: int
    samples: int
    staging: Path
    final: Path
    began: float
    stall_seconds: float = 0.0
    written: bool = False  # this rank's part
    committed: bool = False  # rank 0 alone knows
    left: bool = False  # the run has given up the course that it is of
    error: PretrainError | None = None


class Saver:
    """All ranks make one, and call `save`, `settle` and `wait` together.

    Ending the context ends the writer. A save that is under way then has a few seconds, after Ctrl-C none.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        *,
        world: World,
        attempt: int,
        reporter: Reporter,
        keep_last: int,
        keep_every_steps: int | None = None,
        reach_steps: int = 0,
        max_failures: int = 3,
        max_bytes_per_second: float | None = None,
        mirror: Mirror | None = None,
        is_shared: bool = True,
    ) -> None:
        """`is_shared`: do all ranks see one run_dir? If not, there must be a mirror. reach_steps: see `kept_steps`."""
        self._run_dir = Path(run_dir)
        self._engine = engine
        self._world = world
        self._attempt = attempt
        self._reporter = reporter
        self._kept: dict[str, Any] = {
            "keep_last": keep_last,
            "keep_every_steps": keep_every_steps,
            "reach_steps": reach_steps,
        }
        self._max_failures = max_failures
        self._max_bytes_per_second = max_bytes_per_second
        self._mirror, self._is_shared = mirror, is_shared
        self._saves = 0
        self._failures_in_a_row = 0
        self._under_way: _Save | None = None  # None on all ranks or on none
        self._leaving: dict[str, _Save] = {}  # given up, and the writer has not answered yet
        self._storage: dict[str, float] = {}  # what writers did with the mirror, and nobody has asked for
        self._busy_with = ""  # the id of a save that the writer writes, or clears up behind
        self._snapshot = Snapshot(engine.owned_fragments(), device=engine.device)
        of_all = torch.tensor(self._snapshot.data_bytes, dtype=torch.int64, device=engine.device)
        self._bytes_of_all = int(sum_over_ranks(of_all))
        self._writer = self._start()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(seconds=0.0 if kind is KeyboardInterrupt else _LAST_SECONDS)

    def save(self, facts: Mapping[str, Any], *, wait: bool) -> None:
        """Begin a checkpoint of the state as it is now; `wait`: and return when it is committed.

        `facts`: the manifest's fields that the engine does not know. One that is still being written is waited
        for first. Raises PretrainError on all ranks when saves failed too often in a row, or, with `wait`,
        when this one did.
        """
        began = time.monotonic()
        self.wait()
        self._read_until(lambda: not self._leaving)  # the snapshot is still read by it
        self._read(0)
        if not self._writer.alive:
            self._writer = self._start()
        self._saves += 1
        step, save_id = facts["step"], f"{self._attempt}-{self._saves}"
        save = _Save(
            id=save_id,
            step=step,
            samples=facts["samples"],
            staging=staging_folder(self._run_dir, step, save_id),
            final=self._run_dir / CHECKPOINTS / step_folder(step),
            began=began,
        )
        self._snapshot.take(self._engine.owned_fragments())
        parameters = parameter_shapes(self._engine.module)
        manifest_facts = {
            **facts,
            "optimizer_steps": self._engine.optimizer_steps,
            "world_size": self._world.world_size,
            "zero_stage": self._engine.zero_stage,
            "parameters": parameters,
            "software": {"python": sys.version.split()[0], "torch": torch.__version__},
        }
        self._under_way, self._busy_with = save, save.id
        self._tell(
            {
                "order": "save",
                "id": save.id,
                "staging": str(save.staging),
                "final": str(save.final),
                "pieces": [asdict(piece) for piece in self._snapshot.pieces],
                "needed_bytes": self._needed_bytes(),
                "facts": manifest_facts if self._world.is_main else None,
            }
        )
        save.stall_seconds = time.monotonic() - began
        if wait and (failure := self.wait()) is not None:
            raise PretrainError(f"the checkpoint of step {step} is not saved: {failure}")

    def poll(self) -> None:
        """Hear what the writer has done, and start another where it died. Costs next to nothing."""
        self._read(0)

    def gained(self) -> dict[str, float]:
        """What this rank's writer did with the mirror since the last call, as `TrainLoader.gained` names it."""
        gained, self._storage = self._storage, {}
        return {f"storage_{name}": amount for name, amount in gained.items() if not name.startswith("cache_")}

    def failed(self) -> float:
        """1 when this rank could not do its part of the save that is under way, to be summed over ranks."""
        return float(self._under_way is not None and self._under_way.error is not None)

    def settle(self, failed: float) -> str | None:
        """Act on what all ranks' `failed()` add up to. Returns the reasons when the save was given up.

        Raises PretrainError when that was one too many in a row, UsageError when another attempt has the run.
        """
        if not failed:
            return None
        save, self._under_way = self._under_way, None
        assert save is not None, "a save fails on all ranks or on none"
        # Before the ranks talk: when one has gone on, the main rank's writer is told already.
        self._leaving[save.id] = save
        self._tell({"order": "abandon", "save": save.id, "staging": str(save.staging)})
        reasons = [
            (f"rank {rank}: {error}" if self._world.launched else str(error), error.exit_code)
            for rank, error in enumerate(gather_objects(save.error))
            if error is not None
        ]
        said = "; ".join(reason for reason, _ in reasons)
        self._failures_in_a_row += 1
        self._reporter.checkpoint_failed(
            step=save.step, samples=save.samples, reasons=said, in_a_row=self._failures_in_a_row
        )
        if any(code == UsageError.exit_code for _, code in reasons):
            raise UsageError(said)
        if self._failures_in_a_row > self._max_failures:
            raise PretrainError(
                f"{self._failures_in_a_row} checkpoints in a row could not be saved, more than "
                f"checkpoint.max_failures={self._max_failures}; the last: {said}"
            )
        return said

    def wait(self) -> str | None:
        """Until the save that is under way, if any, is committed or given up; then the reasons. All ranks together.

        A limit of the rate does not hold meanwhile: training stands still anyway. Raises as `settle` does.
        """
        save = self._under_way
        if save is None:
            return None
        self._tell({"order": "hurry"})
        self._read_until(lambda: save.written or save.error is not None)
        if (reasons := self.settle(self._failed_anywhere())) is not None:
            return reasons
        if self._world.is_main:  # all parts are there
            self._tell({"order": "complete"})
            self._read_until(lambda: save.committed or save.error is not None)
        if (reasons := self.settle(self._failed_anywhere())) is not None:
            return reasons
        self._under_way = None
        self._failures_in_a_row = 0
        return None

    @property
    def saves(self) -> int:
        """How many have begun: the number of the newest."""
        return self._saves

    def leave(self, *, beyond: int) -> None:
        """The run goes back to before the position `beyond`: give up a save that is under way and has consumed more,
        and wait for one that has not. All ranks together, once the run's lists say so. Raises as `wait` does.
        """
        save = self._under_way
        if save is None or save.samples <= beyond:
            self.wait()
            return
        self._under_way, save.left = None, True
        self._leaving[save.id] = save
        self._tell({"order": "abandon", "save": save.id, "staging": str(save.staging)})

    def close(self, *, seconds: float = _LAST_SECONDS) -> None:
        """End the writer. A save that is under way may take so long to end by itself."""
        deadline = time.monotonic() + seconds
        if self._busy_with and seconds:
            self._tell({"order": "hurry"})
        while (self._busy_with or self._leaving) and time.monotonic() < deadline:
            self._read(0.05)
        self._writer.end()
        self._snapshot.close()

    def _needed_bytes(self) -> int:
        """What a checkpoint takes on the disk of this host's run_dir."""
        if self._is_shared:
            return self._bytes_of_all
        return self._snapshot.data_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _failed_anywhere(self) -> float:
        return float(sum_over_ranks(torch.tensor(self.failed(), device=self._engine.device)))

    def _start(self) -> WriterProcess:
        return WriterProcess(
            run_dir=str(self._run_dir.absolute()),
            rank=self._world.rank,
            world_size=self._world.world_size,
            attempt=self._attempt,
            memory=self._snapshot.descriptor,
            memory_bytes=self._snapshot.size,
            max_bytes_per_second=self._max_bytes_per_second,
            **self._kept,
            mirror=self._mirror.url if self._mirror else None,
            s3=asdict(self._mirror.s3) if self._mirror else {},
            is_shared=self._is_shared,
            leads_host=self._world.is_main or (not self._is_shared and self._world.local_rank == 0),
        )

    def _tell(self, order: dict[str, Any]) -> None:
        if not self._writer.send(order):
            self._lost()

    def _read_until(self, done: Any) -> None:
        """Training stands still meanwhile. A slow disk may take its time, and is said to; what was stopped does not."""
        look_at, is_said = time.monotonic() + _PATIENCE_SECONDS, False
        while not done():
            self._read(1.0)
            if time.monotonic() < look_at or done():
                continue
            look_at = time.monotonic() + _PATIENCE_SECONDS
            if self._writer.is_stopped:
                self._writer.end_stopped()
            elif not is_said:
                self._say_who_is_waited_for()
                is_said = True

    def _say_who_is_waited_for(self) -> None:
        what = (
            "to be given up" if self._under_way is None else f"of step {self._under_way.step} to be written"
        )
        print(
            f"pretrain: rank {self._world.rank} has waited for {_PATIENCE_SECONDS:g} s for the checkpoint {what} "
            f"(process {self._writer.pid}, {self._writer.state}); is the disk, or the store, that slow?",
            file=sys.stderr,
            flush=True,
        )

    def _read(self, seconds: float) -> None:
        for report in self._writer.receive(seconds):
            self._hear(report)
        if not self._writer.alive:
            self._lost()

    def _hear(self, report: dict[str, Any]) -> None:
        kind, save_id = report["report"], report["save"]
        save = self._under_way
        if kind == "abandoned":
            self._leaving.pop(save_id, None)
        elif kind == "idle":
            counted = report["storage"]  # by a process of its own: nobody else knows of it
            self._storage = {name: self._storage.get(name, 0.0) + counted[name] for name in counted}
            if save_id == self._busy_with:
                self._busy_with = ""
        if kind == "committed" and (about := self._leaving.get(save_id, save)) is not None:
            self._committed(about, size_bytes=report["bytes"], at=report["at"], done=report["monotonic"])
        if save is None or save.id != save_id:
            return
        if kind == "written":
            save.written = True
        elif kind == "failed":
            wrong_usage = report["exit_code"] == UsageError.exit_code
            save.error = (UsageError if wrong_usage else PretrainError)(report["reason"])

    def _committed(self, save: _Save, *, size_bytes: int, at: float, done: float) -> None:
        """at: by the wall's clock; done: by the monotonic one, which all processes of a machine share."""
        save.committed = True
        if save.left:  # it was, just before the run gave it up, and is removed
            return
        self._reporter.checkpoint(
            step=save.step,
            samples=save.samples,
            seconds=done - save.began,
            stall_seconds=save.stall_seconds,
            size_bytes=size_bytes,
            committed_at=at,
            path=save.final,
        )

    def _lost(self) -> None:
        """The writer is gone. What it had not done is not done; another one serves the next save."""
        how = self._writer.how_it_ended()
        self._leaving.clear()
        self._busy_with = ""
        save = self._under_way
        if save is not None and save.error is None and not self._is_done(save):
            save.error = PretrainError(f"the process that writes checkpoints {how}")
        if self._writer.served:  # else it may never serve: that is tried again at the next save
            self._writer = self._start()

    def _is_done(self, save: _Save) -> bool:
        """Had the lost writer done it all, but not said so?"""
        if save.committed or (save.written and not self._world.is_main):
            return True
        if not self._world.is_main:
            return False
        final = save.final if self._is_shared else mirrored_folder(self._run_dir, save.step)
        try:
            if read_manifest(final).save_id != save.id:
                return False
        except CheckpointError:
            return False
        size_bytes = sum(path.stat().st_size for path in final.glob("rank-*.safetensors"))
        save.written = True
        self._committed(save, size_bytes=size_bytes, at=time.time(), done=time.monotonic())
        return True
