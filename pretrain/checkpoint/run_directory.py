"""A run's folder: who may write to it, which attempt this is, and whether it is finished.

    RUN/config.yaml              the resolved recipe of the newest attempt
    RUN/journal.jsonl            what happened, a line an event
    RUN/checkpoints/step-*/      see manifest.py
    RUN/attempts/3/exit-0.json   how each rank of each attempt ended
    RUN/attempts.jsonl           how each attempt ended, see attempts.py
    RUN/finished.json            there only when the run reached its last step

Called by train.py; rank 0 claims. Its checkpoint writer asks whether the claim still holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import EXIT_CRASHED, EXIT_CTRL_C, PretrainError, UsageError
from pretrain.storage.files import sync

FINISHED = "finished.json"
ATTEMPTS = "attempts"
LOCK = "lock"
TURN = "turn"  # held for a moment, by who claims an attempt, commits a checkpoint, or gives some up


class RunDirectory:
    """Exclusive hold on a run's folder, from `claim` until the process ends or `close`."""

    def __init__(self, path: Path, attempt: int, lock: int) -> None:
        self.path = path
        self.attempt = attempt
        self._lock = lock

    @classmethod
    def claim(cls, path: Path, *, taken: Sequence[int] = ()) -> RunDirectory:
        """Make the folder if need be, lock it, and take the next attempt number; `taken`: those elsewhere.

        Raises UsageError when another live attempt holds it or it cannot be written.
        """
        path = Path(path)
        try:
            (path / ATTEMPTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from None
        lock = _lock(path)
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            for number in taken:  # so that this folder knows of all
                (path / ATTEMPTS / str(number)).mkdir(exist_ok=True)
            return cls(path, _next_attempt(path, taken), lock)
        except OSError as error:
            raise _unwritable(path, error) from None

    def close(self) -> None:
        os.close(self._lock)


@contextmanager
def held(path: Path, *, make: bool = False) -> Iterator[None]:
    """Within it no attempt of the run is live. `make`: the folder, if it is not there.

    Raises UsageError when one is, or the folder cannot be written.
    """
    if make:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from None
    lock = _lock(path)
    try:
        yield
    finally:
        os.close(lock)


def _lock(path: Path) -> int:
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "an unknown process"
        os.close(lock)
        raise UsageError(
            f"run_dir={path} is in use by {holder}; wait for it, stop it, or choose another run_dir"
        ) from None
    return lock


@contextmanager
def only_newest_attempt(path: Path, attempt: int) -> Iterator[None]:
    """Within it `attempt` is the run's newest, and no other can be claimed.

    Raises UsageError when there is a newer one: this one was given up for dead, and must not write any more.
    """
    with taking_turns(path):
        newest = max(_attempts(path), default=attempt)
        if newest > attempt:
            raise UsageError(
                f"run_dir={path}: attempt {newest} has taken over from this one, attempt {attempt}; "
                "run one at a time"
            )
        yield


@contextmanager
def taking_turns(path: Path) -> Iterator[None]:
    """Within it no attempt is claimed, no checkpoint listed, and none of the lists of what was given up changes."""
    try:
        turn = os.open(path / TURN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield
    finally:
        os.close(turn)


def _attempts(path: Path) -> list[int]:
    return [int(p.name) for p in (path / ATTEMPTS).glob("*") if p.name.isdigit()]


def _unwritable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"run_dir={path} cannot be written: {error}; free space, or choose another run_dir")


def _next_attempt(path: Path, elsewhere: Sequence[int]) -> int:
    """The number in PRETRAIN_ATTEMPT if there is one, else one more than the highest; made exclusively.

    Where attempts were made `elsewhere` that this folder does not know of, what is given may be too low.
    """
    given = os.environ.get("PRETRAIN_ATTEMPT")
    if given is not None and not given.isdigit():
        raise UsageError(f"PRETRAIN_ATTEMPT={given!r} is not a number; unset it")
    taken = _attempts(path)
    number = int(given) if given is not None else max(taken, default=0) + 1
    number = max(number, max(elsewhere, default=0) + 1)
    try:
        with taking_turns(path):
            (path / ATTEMPTS / str(number)).mkdir()
    except FileExistsError:
        raise UsageError(
            f"attempt {number} of {path} was claimed already; unset PRETRAIN_ATTEMPT or give {max(taken) + 1}"
        ) from None
    return number


@dataclass
class Ending:
    """How a process will have ended; 0 unless it says otherwise or an exception does."""

    code: int = 0
    reason: str = "finished"


@contextmanager
def recorded_exit(path: Path, attempt: int, rank: int) -> Iterator[Ending]:
    """Leave `attempts/N/exit-RANK.json` behind, for whoever asks how it ended: code, reason, and the kind of error."""
    ending, kind = Ending(), None
    try:
        yield ending
    except PretrainError as error:
        kind, ending.code, ending.reason = type(error).__name__, error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        ending.code, ending.reason = EXIT_CTRL_C, "Ctrl-C"
        raise
    except BaseException as error:
        kind, ending.code, ending.reason = (
            type(error).__name__,
            EXIT_CRASHED,
            f"{type(error).__name__}: {error}",
        )
        raise
    finally:
        who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        record = {**who, **vars(ending), "error": kind, "time": time.time()}
        folder = Path(path) / ATTEMPTS / str(attempt)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"exit-{rank}.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
        except OSError as error:  # a full disk must not hide what the process really ended with
            print(f"{folder}: how rank {rank} ended cannot be written: {error}", file=sys.stderr)


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path`, durably, whole or not at all. Raises PretrainError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):  # what kept it from being written may keep it from being removed
            temporary.unlink(missing_ok=True)
        raise PretrainError(
            f"{path}: cannot be written: {error}; free space, or set run_dir elsewhere"
        ) from None


def mark_finished(path: Path, **facts: Any) -> None:
    """Record that the run reached its last step. Raises PretrainError when that cannot be written."""
    write_whole(Path(path) / FINISHED, json.dumps({**facts, "time": time.time()}).encode() + b"\n")


def finished_step(path: Path) -> int | None:
    """The last step of a run that reached it, None of one that did not.

    Raises UsageError when `path` cannot be a run's folder, or the record cannot be read.
    """
    record = Path(path) / FINISHED
    try:
        return int(json.loads(record.read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"run_dir={path} cannot be used: {error}; choose another run_dir") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{record} is damaged ({error}); remove it, and the run goes on from its newest checkpoint"
        ) from None


def stopped_early(path: Path) -> bool:
    """Did the run, which is finished, end because validation became no better?"""
    return bool(json.loads((Path(path) / FINISHED).read_text(encoding="utf-8")).get("stopped_early"))


def unmark_finished(path: Path) -> None:
    """The run goes on beyond what was its end. Raises OSError."""
    (Path(path) / FINISHED).unlink(missing_ok=True)
