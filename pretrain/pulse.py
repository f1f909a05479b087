"""Where a training process is, in memory that its watchdog reads. Called by train.py at every turn of its loop.

The watchdog (watchdog.py) is a process beside each rank: a rank that is stopped, or whose interpreter
is held by native code, cannot help itself. Nothing here compares wall clocks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from pretrain.errors import PretrainError

# In the order of a step: of two ranks at the same step, the one in the later phase is further.
PHASES = (
    "start",  # up to the first step: loading, building, joining
    "data",
    "count",  # what the loss is divided by, summed over ranks
    "forward",
    "backward",
    "optimizer",
    "report",  # the step's sums over ranks, journal, decisions
    "save",
    "validate",
    "end",  # training is over, well or not, and the process is not
)
LONG_PHASES = ("start", "save", "validate")
LEAST_END_SECONDS = 60.0  # putting everything away takes as long as it takes, however short the steps are
UNWATCHED_SECONDS = 600.0, 1800.0  # what an alarm goes by where nobody watches: config's defaults
BEAT_SECONDS = 0.5
DUMP_SIGNAL = signal.SIGUSR2  # answered in C, also while the interpreter is held; SIGUSR1 asks a run to stop

_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_PAGE = 4096
_PLACE = struct.Struct("@qqqd")  # changes, phase, step, when by the monotonic clock
_WORD = struct.Struct("@q")
_BEATS_AT, _STARTED_AT = 64, 128  # cache lines of their own
_MOST_RESTARTS = 5
_MINDED_BY_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Sight(NamedTuple):
    """What a pulse shows at one moment."""

    changes: int
    phase: str
    step: int  # optimizer steps that were done
    at: float  # monotonic, of the last change
    beats: int  # of a thread that does nothing else
    started: int  # the step that the process began with, or went back to


def read_sight(memory: mmap.mmap) -> Sight:
    """The pulse's state; read until two readings agree, for the writer does not wait for us."""
    place = _PLACE.unpack_from(memory, 0)
    while (again := _PLACE.unpack_from(memory, 0)) != place:
        place = again
    changes, phase, step, at = place
    [beats] = _WORD.unpack_from(memory, _BEATS_AT)
    [started] = _WORD.unpack_from(memory, _STARTED_AT)
    return Sight(changes, PHASES[phase], step, at, beats, started)


def limit_of(sight: Sight, *, step_seconds: float, start_seconds: float) -> float:
    """Seconds without a move that a rank may take where it is."""
    if sight.phase == "end":
        return max(step_seconds, LEAST_END_SECONDS)
    is_first = sight.step <= sight.started  # compilers and caches are warmed in it
    return start_seconds if is_first or sight.phase in LONG_PHASES else step_seconds


class Pulse:
    """Tell `at(phase, step)` at every turn; `watch` has a watchdog look at it. Close it, or let it die with us."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("pretrain-pulse") if hasattr(os, "memfd_create") else None
        if self._descriptor is None:
            self._memory = mmap.mmap(-1, _PAGE)
        else:
            os.ftruncate(self._descriptor, _PAGE)
            self._memory = mmap.mmap(self._descriptor, _PAGE)
        self._changes = self._step = 0
        self._watchdog: _Watchdog | None = None
        self._step_seconds, self._start_seconds = UNWATCHED_SECONDS
        self.at("start", 0)

    def at(self, phase: str, step: int | None = None) -> None:
        """We are in `phase` (one of PHASES) after `step` optimizer steps, or as many as were told last.

        Takes about a microsecond. "start" means that the next step is a first one, and may take longer.
        """
        if step is not None:
            self._step = step
        self._changes += 1
        _PLACE.pack_into(self._memory, 0, self._changes, _NUMBERS[phase], self._step, monotonic())
        if phase == "start":
            _WORD.pack_into(self._memory, _STARTED_AT, self._step)

    @property
    def idle_seconds(self) -> float:
        """Since the last `at`. From any thread."""
        return monotonic() - read_sight(self._memory).at

    @property
    def limit_seconds(self) -> float:
        """How long `idle_seconds` may get in the phase that it is in. From any thread."""
        sight = read_sight(self._memory)
        return limit_of(sight, step_seconds=self._step_seconds, start_seconds=self._start_seconds)

    def watch(
        self,
        folder: Path,
        *,
        rank: int,
        hosts: Sequence[str],
        step_seconds: float | None,
        start_seconds: float,
    ) -> None:
        """Start the watchdog: from now on this process is killed when it does not move for too long.

        `folder`: RUN/attempts/N, where it writes what it saw. hosts: of all ranks. step_seconds: None for
        no watchdog; there is none either where there is no /proc (anywhere but on Linux). Raises
        PretrainError when it cannot be started.
        """
        if step_seconds is None or self._descriptor is None:
            return
        self._step_seconds, self._start_seconds = step_seconds, max(step_seconds, start_seconds)
        task = {
            "pid": os.getpid(),
            "folder": str(folder),
            "rank": rank,
            "hosts": list(hosts),
            "step_seconds": step_seconds,
            "start_seconds": self._start_seconds,
        }
        try:
            self._watchdog = _Watchdog(self._memory, self._descriptor, task)
        except OSError as error:
            raise PretrainError(
                f"rank {rank}: its watchdog process cannot be started: {error}; free memory or processes, or run "
                "without it (watchdog.step_seconds=null)"
            ) from None

    def close(self) -> None:
        """Nobody watches any more."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None


class _Watchdog:
    """The watchdog as its rank sees it: the process, and the thread that beats, and starts it again if it dies."""

    def __init__(self, memory: mmap.mmap, pulse: int, task: dict[str, object]) -> None:
        self._memory, self._pulse, self._task = memory, pulse, task
        # Not a file: writing one would wait for a file system that hangs, in the very moment it is wanted.
        self._stacks = os.memfd_create("pretrain-stacks")
        self._restarts = 0
        self._process = self._start()
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._process.kill()
        self._process.wait()
        faulthandler.unregister(DUMP_SIGNAL)
        os.close(self._stacks)

    def _start(self) -> subprocess.Popen[bytes]:
        descriptors = {"pulse": self._pulse, "stacks": self._stacks}
        task = json.dumps({**self._task, **descriptors}).encode()
        # Blocked signals stay blocked in the child: a Ctrl-C does not even meet it while it starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _MINDED_BY_THE_RANK)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.watchdog"],
                stdin=subprocess.PIPE,  # the names of thousands of hosts are too long for an argument
                stdout=2,
                pass_fds=tuple(descriptors.values()),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert process.stdin is not None, "it was asked for"
        with process.stdin as pipe:
            pipe.write(task)
        return process

    def _beat(self) -> None:
        beats = 0
        while not self._closed.wait(BEAT_SECONDS):
            beats += 1
            _WORD.pack_into(self._memory, _BEATS_AT, beats)
            if self._process.poll() is not None and self._restarts < _MOST_RESTARTS:
                self._restarts += 1
                last = ", for the last time" if self._restarts == _MOST_RESTARTS else ""
                with contextlib.suppress(OSError, ValueError):  # a terminal that went away
                    print(
                        f"pretrain: the watchdog of rank {self._task['rank']} was lost; it is started again{last}",
                        file=sys.stderr,
                        flush=True,
                    )
                with contextlib.suppress(OSError):  # tried again at the next beat
                    self._process = self._start()
