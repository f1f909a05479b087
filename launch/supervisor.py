"""Start a node's ranks, pass signals on, and say with one exit code how the run ended. Used by local.py.

Each rank leads a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone and
is passed on once. Ranks die with the supervisor, even when it is killed; what they started ends
with them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launch.processes import become_subreaper, children_of, die_with_parent, end_children, reap
from pretrain.errors import EXIT_CRASHED, EXIT_CTRL_C, EXIT_FINISHED, EXIT_INTERRUPTED

NOT_RESTARTED = (2, 3, 4)  # usage, data, checkpoint: the causes that a restart would only meet again
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LONGEST_LINE = 1 << 16
_KILLED_BUT_ALIVE_SECONDS = 30.0  # a process inside a dead file system does not even take SIGKILL


def exit_code(codes: Sequence[int], *, ctrl_c: bool, terminated: bool, finished: bool) -> int:
    """One exit code from those of the ranks (negative: ended by that signal).

    A cause that a restart would meet again (2 to 4) comes first, then Ctrl-C (130), an interruption
    (75), a crash (1). 0 is for a run whose ranks all ended with 0 and that is recorded as finished.
    """
    for code in NOT_RESTARTED:
        if code in codes:
            return code
    if finished and all(code == EXIT_FINISHED for code in codes):
        return EXIT_FINISHED
    if ctrl_c or EXIT_CTRL_C in codes:
        return EXIT_CTRL_C
    if terminated or EXIT_INTERRUPTED in codes:
        return EXIT_INTERRUPTED
    return EXIT_CRASHED


def run_ranks(
    command: Sequence[str],
    *,
    environments: Sequence[Mapping[str, str]],
    finished: Path | None = None,
    save_seconds: float = 120.0,
    peer_seconds: float = 15.0,
    kill_seconds: float = 10.0,
) -> int:
    """Run `command` once for each whole environment, as one rank each, and wait for all.

    - SIGTERM or SIGHUP goes to all ranks as SIGTERM, Ctrl-C as SIGINT; they have `save_seconds` to
      save and end. A second Ctrl-C kills them at once.
    - When a rank fails, the others have `peer_seconds` to notice by themselves, then get SIGTERM,
      and `kill_seconds` later SIGKILL.
    - Rank 0 writes to our own stdout and stderr; what the others write comes to stderr, each line
      after `[rank N]`.

    Returns the exit code as `exit_code` says; `finished` is the file that must exist for 0 (None:
    none need). Leaves no process behind: whatever the ranks started is ended as well. For the main
    thread of a Linux process. Raises OSError when the command cannot be started.
    """
    spared = children_of(os.getpid())  # not ours to end
    was_subreaper = become_subreaper()
    ranks: list[_Rank] = []
    try:
        with _Inbox() as inbox:
            _start(command, environments, inbox, ranks)
            relays = _relay_output(ranks)
            family = _Family(
                ranks,
                spared=spared,
                save_seconds=save_seconds,
                peer_seconds=peer_seconds,
                kill_seconds=kill_seconds,
            )
            family.wait(inbox)
            _end_all(ranks, spared)
            for relay in relays:
                relay.join(timeout=5.0)
    finally:
        _end_all(ranks, spared)
        become_subreaper(was_subreaper)
    is_finished = finished is None or finished.is_file()
    codes = [rank.code_that_counts for rank in ranks]
    if not is_finished and all(code == EXIT_FINISHED for code in codes):
        say(f"every rank ended with exit code 0, but {finished} is not there: the run is not finished")
    return exit_code(
        codes,
        ctrl_c=family.ctrl_c_count > 0,
        terminated=family.terminated,
        finished=is_finished,
    )


def say(text: str) -> None:
    # A terminal that went away must not keep us from ending the ranks.
    with contextlib.suppress(OSError, ValueError):
        print(f"pretrain launch: {text}", file=sys.stderr, flush=True)


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    exit_code: int | None = None  # negative: the signal that ended it
    ended_by_us: bool = False  # because another rank had failed

    @property
    def code_that_counts(self) -> int:
        assert self.exit_code is not None, f"rank {self.number} is still running"
        if self.ended_by_us and self.exit_code in (EXIT_FINISHED, EXIT_INTERRUPTED):
            return EXIT_CRASHED  # it ended well because it was told to; the run did not
        return self.exit_code

    def signal(self, signum: signal.Signals) -> None:
        if self.exit_code is None:
            os.kill(self.process.pid, signum)

    def kill(self) -> None:
        if self.exit_code is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def collect(self) -> bool:
        """Whether the rank has ended by now. What it left in its process group is ended first, while the
        dead leader still keeps the group's number from being given to anyone else."""
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        self.exit_code = self.process.wait()
        return True


class _Inbox:
    """Signals as things to read. Python's own handlers may run on any thread's behalf and in any
    order with our code; a pipe that the main loop reads has neither problem."""

    def __enter__(self) -> _Inbox:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._reader, selectors.EVENT_READ)
        # What the caller ignores (SIGHUP under nohup), we and the ranks ignore too.
        self.handled = [s for s in _ENDING_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            signum: signal.signal(signum, lambda *_: None) for signum in [*self.handled, signal.SIGCHLD]
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._selector.close()
        os.close(self._reader)
        os.close(self._writer)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Ending signals wait until the block is left."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.handled)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def wait(self, seconds: float | None) -> list[int]:
        """The signals that came, at once or within `seconds` (None: however long it takes)."""
        if not self._selector.select(seconds):
            return []
        return list(os.read(self._reader, 4096))


class _Family:
    """The ranks while they run: which were told to end, why, and by when."""

    def __init__(
        self,
        ranks: Sequence[_Rank],
        *,
        spared: set[int],
        save_seconds: float,
        peer_seconds: float,
        kill_seconds: float,
    ) -> None:
        self.ctrl_c_count = 0
        self.terminated = False
        self._ranks = ranks
        self._spared = spared
        self._save_seconds = save_seconds
        self._peer_seconds = peer_seconds
        self._kill_seconds = kill_seconds
        self._failure_seen = False
        self._term_at = self._kill_at = self._give_up_at = float("inf")

    def wait(self, inbox: _Inbox) -> None:
        """Until every rank has ended, or is beyond SIGKILL."""
        while running := self._running():
            now = time.monotonic()
            due = min(self._term_at, self._kill_at, self._give_up_at)
            for signum in inbox.wait(None if due == float("inf") else max(0.0, due - now)):
                self._on_signal(signum)
            self._collect(running)
            now = time.monotonic()
            if now >= self._term_at:
                self._end_peers(now)
            if now >= self._kill_at:
                self._kill(now)
            if now >= self._give_up_at:
                for rank in self._running():
                    say(f"rank {rank.number} (process {rank.process.pid}) does not end even when killed")
                    rank.exit_code = -signal.SIGKILL

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.exit_code is None]

    def _on_signal(self, signum: int) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT:
            self.ctrl_c_count += 1
            if self.ctrl_c_count > 1:
                say("Ctrl-C again: ending the ranks without saving")
                self._kill_at = now
                return
            say("Ctrl-C: the ranks save and end; press it again to end them without saving")
            self._pass_on(signal.SIGINT, now)
        elif signum in _ENDING_SIGNALS and not self.terminated:
            self.terminated = True
            say(f"{signal.Signals(signum).name}: the ranks save and end, within {self._save_seconds:g} s")
            self._pass_on(signal.SIGTERM, now)

    def _pass_on(self, signum: signal.Signals, now: float) -> None:
        for rank in self._running():
            rank.signal(signum)
        self._kill_at = min(self._kill_at, now + self._save_seconds)

    def _collect(self, running: Sequence[_Rank]) -> None:
        for rank in running:
            if rank.collect() and rank.exit_code:
                if not rank.ended_by_us:
                    say(f"rank {rank.number} (process {rank.process.pid}) {_how_it_ended(rank.exit_code)}")
                if not self._failure_seen:
                    self._failure_seen = True
                    self._term_at = time.monotonic() + self._peer_seconds
        # Ranks' descendants that lost their parent have come to us; ended ones must not pile up.
        ours = {rank.process.pid for rank in self._ranks}
        reap(children_of(os.getpid()) - self._spared - ours)

    def _end_peers(self, now: float) -> None:
        self._term_at = float("inf")
        for rank in self._running():
            say(f"rank {rank.number} is still running: ending it, because another rank has ended")
            rank.ended_by_us = True
            rank.signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, now + self._kill_seconds)

    def _kill(self, now: float) -> None:
        self._kill_at = float("inf")
        self._give_up_at = now + _KILLED_BUT_ALIVE_SECONDS
        for rank in self._running():
            if self.ctrl_c_count <= 1:
                say(f"rank {rank.number} did not end in time: killing it; it may not have saved")
            rank.ended_by_us = True
            rank.kill()


def _start(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    inbox: _Inbox,
    ranks: list[_Rank],
) -> None:
    with inbox.held():
        for number, environment in enumerate(environments):
            output = None if number == 0 else subprocess.PIPE
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if number == 0 else subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(inbox.handled),
            )
            ranks.append(_Rank(number, process))


def _relay_output(ranks: Sequence[_Rank]) -> list[threading.Thread]:
    # Started after the last fork: a fork while another thread runs may copy a lock that it holds.
    relays = []
    for rank in ranks:
        if rank.process.stdout is not None:
            thread = threading.Thread(
                target=_relay, args=(rank.process.stdout, f"[rank {rank.number}] ".encode()), daemon=True
            )
            thread.start()
            relays.append(thread)
    return relays


def _relay(source: BinaryIO, prefix: bytes) -> None:
    if sys.stderr.isatty():
        prefix = b"\r\x1b[K" + prefix  # over rank 0's progress line, which comes back with its next step
    with source:
        while line := source.readline(_LONGEST_LINE):
            data = prefix + line.rstrip(b"\r\n") + b"\n"
            # When nobody reads us any more, go on reading: the rank must not block on a full pipe.
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data) :]


def _end_all(ranks: Sequence[_Rank], spared: set[int]) -> None:
    for rank in ranks:
        if rank.exit_code is None:
            rank.kill()
            rank.exit_code = rank.process.wait()
    if left := end_children(spare=spared, seconds=10.0):
        say(f"processes {sorted(left)}, started by the ranks, do not end even when killed")


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "; out of memory? see `dmesg`" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
