"""The process that writes a rank's part of checkpoints, beside training. Started by saver.py, one a rank.

A process and not a thread: it hashes and writes without the trainer's interpreter lock, at a low priority,
and imports no torch. It minds neither SIGTERM nor Ctrl-C, for these are the trainer's, who wants to save
then; it ends when the trainer closes its side, and dies with it.

Orders and reports are JSON lines over a socket. Orders: `save`, `abandon`, `hurry`, `complete` (all
ranks have written). Reports of a save, by its
id: `written` (this rank's part is durable), `committed` (rank 0 only), `failed`, and at last `idle`; `abandoned`.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.courses import read_given_up
from pretrain.checkpoint.manifest import Manifest, mirrored_folder
from pretrain.checkpoint.mirror import Mirror, MirroredSave
from pretrain.checkpoint.retention import check_space, retain, step_of
from pretrain.checkpoint.run_directory import only_newest_attempt
from pretrain.checkpoint.staging import (
    Part,
    Piece,
    commit,
    finished_parts,
    manifest_of,
    part_name,
    remove_torn_saves,
    unwritable,
    write_part,
)
from pretrain.errors import PretrainError
from pretrain.storage import RetryPolicy, S3Settings, counters
from pretrain.storage.files import sync

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NICENESS = 10
_SEEN_SECONDS = 60.0  # a network mount may show a new file late
_FIRST_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.002, 0.1  # for the parts of other ranks
_LONGEST_MIRROR_LOOK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a writer is started with."""

    run_dir: str
    rank: int
    world_size: int
    attempt: int
    parent: int  # process id of the trainer
    memory: int  # descriptor of the snapshot …
    memory_bytes: int  # … and its size
    control: int  # descriptor of the socket
    max_bytes_per_second: float | None
    keep_last: int
    keep_every_steps: int | None
    reach_steps: int  # see `kept_steps`
    mirror: str | None  # its URL …
    s3: dict[str, Any]  # … and how to talk to it
    is_shared: bool  # do all ranks see one run_dir?
    leads_host: bool  # is this the rank that minds its host's folder?

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Order:
    """One save. `facts`, the manifest's fields other than files, only rank 0's writer is given."""

    id: str
    staging: str
    final: str
    pieces: list[Piece]
    needed_bytes: int  # on this disk, by all ranks
    facts: dict[str, Any] | None


class AbandonedError(Exception):
    """The save was given up, because a rank could not do its part."""


class _Control:
    """The trainer's side, as the writer hears it. Ends the process when the trainer has gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""
        self._orders: deque[dict[str, Any]] = deque()
        self._abandoned: set[str] = set()
        self.in_a_hurry = False
        self.is_complete = False

    def next_order(self) -> dict[str, Any]:
        """The next `save`, or the `abandon` that ended the one before; however long that takes."""
        while not self._orders:
            self._hear(None)
        return self._orders.popleft()

    def wait(self, save_id: str, seconds: float) -> None:
        """Sleep, unless the trainer says something. Raises AbandonedError when it gave this save up."""
        self._hear(seconds)
        if save_id in self._abandoned:
            raise AbandonedError

    def tell(self, report: str, save_id: str, **facts: Any) -> None:
        line = json.dumps({"report": report, "save": save_id, **facts}).encode() + b"\n"
        try:
            self._connection.sendall(line)
        except OSError:
            sys.exit(0)  # nobody is there to be told

    def _hear(self, seconds: float | None) -> None:
        if not select.select([self._connection], [], [], seconds)[0]:
            return
        try:
            received = self._connection.recv(1 << 20)
        except OSError:
            received = b""
        if not received:
            sys.exit(0)
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["order"] == "hurry":
                self.in_a_hurry = True
                continue
            if message["order"] == "complete":
                self.is_complete = True
                continue
            if message["order"] == "abandon":
                self._abandoned.add(message["save"])
            else:
                self.in_a_hurry = self.is_complete = False
            self._orders.append(message)


class _Pace:
    """Holds writing, or uploading, to so many bytes a second, and listens to the trainer meanwhile."""

    def __init__(self, control: _Control, save_id: str, bytes_per_second: float | None) -> None:
        self._control, self._save_id, self._rate = control, save_id, bytes_per_second
        self._began, self._bytes = time.monotonic(), 0

    def __call__(self, count: int) -> None:
        self._control.wait(self._save_id, 0)
        self._bytes += count
        if self._rate is None:
            return
        while not self._control.in_a_hurry:
            early = self._bytes / self._rate - (time.monotonic() - self._began)
            if early <= 0:
                return
            self._control.wait(self._save_id, early)


class Writer:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._run_dir = Path(settings.run_dir)
        self._is_main = settings.rank == 0
        memory = mmap.mmap(settings.memory, settings.memory_bytes, prot=mmap.PROT_READ)
        self._data = memoryview(memory)
        self._control = _Control(socket.socket(fileno=settings.control))
        # The trainer has talked to it before: an answer that fails to come is an outage, and not a wrong address.
        self._mirror = Mirror(settings.mirror, s3=settings_of_s3(settings.s3)) if settings.mirror else None

    def run(self) -> None:
        while True:
            message = self._control.next_order()
            if message["order"] == "abandon":
                if self._settings.leads_host:  # here or at the next save: ranks may still be leaving it
                    shutil.rmtree(message["staging"], ignore_errors=True)
                self._control.tell("abandoned", message["save"])
                continue
            message.pop("order")
            pieces = [Piece(**piece) for piece in message.pop("pieces")]
            self._save(Order(pieces=pieces, **message))

    def _save(self, order: Order) -> None:
        before = counters.snapshot()
        try:
            if self._settings.leads_host:
                self._clear_up(Path(order.staging))
            check_space(self._run_dir, order.needed_bytes)
            part = self._write(order)
            self._control.tell("written", order.id, bytes=part.size_bytes)
            if self._is_main:
                self._commit(order)
            elif self._settings.leads_host and not self._settings.is_shared:
                self._follow(order)
        except AbandonedError:
            return  # the order to abandon comes next, and is answered
        except PretrainError as error:
            self._control.tell("failed", order.id, reason=str(error), exit_code=error.exit_code)
        finally:
            self._control.tell("idle", order.id, storage=counters.since(before))

    def _write(self, order: Order) -> Part:
        settings, staging = self._settings, Path(order.staging)
        pace = _Pace(self._control, order.id, settings.max_bytes_per_second)
        part = write_part(staging, settings.rank, order.pieces, self._data, pace=pace)
        if self._mirror is not None:
            file = staging / part_name(settings.rank)
            pace = _Pace(self._control, order.id, settings.max_bytes_per_second)  # of the way there alone
            self._mirror.put_part(_mirrored(order), settings.rank, file, part, pace=pace)
            if not self._is_main:
                self._mirror.push(self._run_dir, rank=settings.rank)
            self._control.wait(order.id, 0)
        return part

    def _commit(self, order: Order) -> None:
        assert order.facts is not None, "rank 0 knows what the manifest says"
        staging, final = Path(order.staging), Path(order.final)
        parts = self._await_parts(order)
        manifest = manifest_of(parts, {**order.facts, "save_id": order.id}, staging)
        if self._settings.is_shared:
            _check_sizes(staging, parts)
        self._sync_journal()
        with only_newest_attempt(self._run_dir, self._settings.attempt):
            self._refuse_given_up(manifest)  # its lists change only where we would have to wait
            if self._mirror is not None:
                self._mirror.push(self._run_dir, rank=0)
                self._mirror.require_newest(self._settings.attempt)
                self._mirror.publish(_mirrored(order), manifest)  # the run's judge comes first
            self._list(staging, final, manifest)
        total = sum(part.size_bytes for part in parts.values())
        # Both clocks, read here: the trainer may hear of it much later, behind a validation.
        told = {"bytes": total, "path": str(final), "at": time.time(), "monotonic": time.monotonic()}
        self._control.tell("committed", order.id, **told)
        self.retain(step=step_of(Path(order.final)), save_id=order.id)

    def _refuse_given_up(self, manifest: Manifest) -> None:
        if read_given_up(self._run_dir).has(manifest):
            raise PretrainError(
                f"step {manifest.step} is of a course that the run has given up; it is not saved"
            )

    def _follow(self, order: Order) -> None:
        """On a host with a disk of its own: list what this host has once the whole is committed in the mirror."""
        assert self._mirror is not None, "without a mirror there is one run_dir for all"
        look = _FIRST_LOOK_SECONDS
        while (manifest := self._mirror.committed_manifest(_mirrored(order))) is None:
            self._control.wait(order.id, look)
            look = min(2 * look, _LONGEST_LOOK_SECONDS)
        self._list(Path(order.staging), Path(order.final), manifest)
        self.retain(step=step_of(Path(order.final)), save_id=order.id)

    def _list(self, staging: Path, final: Path, manifest: Manifest) -> None:
        if self._settings.is_shared:
            commit(staging, final, manifest)
        else:  # the other hosts' parts are in the mirror
            commit(staging, mirrored_folder(self._run_dir, manifest.step), manifest)

    def _await_parts(self, order: Order) -> dict[int, Part]:
        world_size, look = self._settings.world_size, _FIRST_LOOK_SECONDS
        parts: dict[int, Part] = {}
        seen_by = math.inf
        while True:
            if self._mirror is None:
                parts = finished_parts(Path(order.staging), world_size)
            else:
                parts = self._mirror.finished_parts(_mirrored(order), parts)
            if len(parts) == world_size:
                break
            if self._control.is_complete:
                seen_by = min(seen_by, time.monotonic() + _SEEN_SECONDS)
            if time.monotonic() > seen_by:
                unseen = min(set(range(world_size)) - set(parts))
                raise PretrainError(
                    f"{order.staging}: rank {unseen} has written its part, and {_SEEN_SECONDS:g} s later it is not "
                    "to be seen here; has anything removed it, or is the mount not the same?"
                )
            self._control.wait(order.id, look)
            look = min(
                2 * look, _LONGEST_LOOK_SECONDS if self._mirror is None else _LONGEST_MIRROR_LOOK_SECONDS
            )
        # Looked at once more: a rank that was told to give up may have overwritten what a part was made of.
        self._control.wait(order.id, 0)
        return parts

    def _sync_journal(self) -> None:
        """What the checkpoint was made by must outlast a power cut when the checkpoint does."""
        journal = self._run_dir / "journal.jsonl"
        try:
            if journal.exists():
                sync(journal)
        except OSError as error:
            raise unwritable(journal, error) from None

    def retain(self, *, step: int, save_id: str) -> None:
        """Remove what need not stay beside the save that was just committed."""
        kept = {
            "keep_last": self._settings.keep_last,
            "keep_every_steps": self._settings.keep_every_steps,
            "reach_steps": self._settings.reach_steps,
        }
        try:
            # An attempt that was overtaken removes nothing: its successor may be reading it.
            with only_newest_attempt(self._run_dir, self._settings.attempt):
                retain(self._run_dir, **kept)  # type: ignore[arg-type]
            if self._mirror is not None and self._is_main:
                self._mirror.require_newest(self._settings.attempt)
                newest = MirroredSave.of(step, save_id)
                self._mirror.retain(newest=newest, run_dir=self._run_dir, **kept)  # type: ignore[arg-type]
        except PretrainError as error:  # the checkpoint is committed all the same
            print(f"pretrain: {error}", file=sys.stderr, flush=True)

    def _clear_up(self, spare: Path) -> None:
        """Remove what torn saves left. All ranks have begun the one to be spared, or will."""
        try:
            remove_torn_saves(self._run_dir, spare=spare)
        except OSError as error:
            print(f"pretrain: what an unfinished save left cannot be removed: {error}", file=sys.stderr)


def _mirrored(order: Order) -> MirroredSave:
    return MirroredSave.of(step_of(Path(order.final)), order.id)


def _check_sizes(staging: Path, parts: Mapping[int, Part]) -> None:
    for rank, part in parts.items():
        path = staging / part_name(rank)
        if not path.is_file() or path.stat().st_size != part.size_bytes:
            raise PretrainError(
                f"{path}: is not the {part.size_bytes} bytes that rank {rank} wrote; check the disk or the mount"
            )


def settings_of_s3(settings: Mapping[str, Any]) -> S3Settings:
    """What `dataclasses.asdict` made of them."""
    return S3Settings(**{**settings, "retry": RetryPolicy(**settings["retry"]), "known_to_answer": True})


def become_writer(parent: int) -> None:
    """Be the trainer's: minding no signals but SIGKILL, ending with it, in nobody's way."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be asked for that
        sys.exit(0)
    os.nice(_NICENESS)


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    become_writer(settings.parent)
    Writer(settings).run()


if __name__ == "__main__":
    main()
