"""A node's ranks while they run: started, told to save, ended together. Used by supervisor.py.

Each rank leads a session of its own, so that Ctrl-C in a terminal reaches the supervisor alone and
is passed on once. Ranks die with the supervisor, even when it is killed; what they started ends
with them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from launch.inbox import Inbox
from launch.processes import children_of, die_with_parent, end_children, reap
from pretrain.errors import EXIT_CRASHED, EXIT_FINISHED, EXIT_INTERRUPTED

NEVER = float("inf")
_LONGEST_LINE = 1 << 16
_KILLED_BUT_ALIVE_SECONDS = 30.0  # a process inside a dead file system does not even take SIGKILL


def say(text: str) -> None:
    # A terminal that went away must not keep us from ending the ranks.
    with contextlib.suppress(OSError, ValueError):
        print(f"pretrain launch: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds: to save and end after SIGTERM; to notice by oneself that a peer is gone; from SIGTERM to SIGKILL
    of those who did not."""

    save_seconds: float = 120.0
    peer_seconds: float = 15.0
    kill_seconds: float = 10.0


@dataclass
class Rank:
    """One rank's process. `number` is its rank in the run."""

    number: int
    process: subprocess.Popen[bytes]
    exit_code: int | None = None  # negative: the signal that ended it
    ended_by_us: bool = False  # because another rank had failed
    ended_at: float = 0.0  # monotonic

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
        self.ended_at = time.monotonic()
        return True


def code_that_counts(code: int, *, ended_by_us: bool) -> int:
    """A rank that ended well only because it was told to, as another had failed, does not make the run end well."""
    return EXIT_CRASHED if ended_by_us and code in (EXIT_FINISHED, EXIT_INTERRUPTED) else code


class Link(Protocol):
    """Who else must hear of this node's ranks, and may speak to them: the other nodes of a run."""

    def told(self, signum: int) -> None:
        """This node was asked to stop."""

    def failed(self, rank: Rank) -> None:
        """This node's first rank to fail has ended."""

    def on(self, event: Any, family: Family) -> None:
        """Something came that is not a signal."""

    def tick(self, family: Family) -> float:
        """Do what is due; returns the moment (monotonic) of the next call."""


class Family:
    """The ranks while they run: which were told to end, why, and by when."""

    def __init__(
        self, ranks: Sequence[Rank], *, spared: set[int], patience: Patience, link: Link | None = None
    ) -> None:
        self.ctrl_c_count = 0
        self.terminated = False
        self._ranks = ranks
        self._spared = spared
        self._patience = patience
        self._link = link
        self._failure_seen = False
        self._term_at = self._kill_at = self._give_up_at = NEVER

    def wait(self, inbox: Inbox) -> None:
        """Until every rank has ended, or is beyond SIGKILL."""
        link_at = time.monotonic() if self._link else NEVER
        while running := self._running():
            now = time.monotonic()
            due = min(self._term_at, self._kill_at, self._give_up_at, link_at)
            for event in inbox.wait(None if due == NEVER else max(0.0, due - now)):
                if isinstance(event, int):
                    self._on_signal(event)
                elif self._link:
                    self._link.on(event, self)
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
            if self._link and now >= link_at:
                link_at = self._link.tick(self)

    def stop(self, signum: int) -> None:
        """Let the ranks save and end; a second Ctrl-C ends them without. A second SIGTERM changes nothing: the save
        that the first one asked for goes on."""
        now = time.monotonic()
        if signum == signal.SIGINT:
            self.ctrl_c_count += 1
            if self.ctrl_c_count > 1:
                say("Ctrl-C again: ending the ranks without saving")
                self._kill_at = now
                return
            say("Ctrl-C: the ranks save and end; press it again to end them without saving")
            self._pass_on(signal.SIGINT, now)
        elif not self.terminated:
            self.terminated = True
            name, seconds = signal.Signals(signum).name, self._patience.save_seconds
            say(f"{name}: the ranks save and end, within {seconds:g} s")
            self._pass_on(signal.SIGTERM, now)

    def lost(self, why: str) -> None:
        """A rank elsewhere has failed, or its host is gone: ours end soon, by themselves or not."""
        if not self._failure_seen:
            self._failure_seen = True
            say(why)
            self._term_at = time.monotonic() + self._patience.peer_seconds

    def end_now(self) -> None:
        """Without saving."""
        self._kill_at = time.monotonic()

    def _running(self) -> list[Rank]:
        return [rank for rank in self._ranks if rank.exit_code is None]

    def _on_signal(self, signum: int) -> None:
        if self._link:
            self._link.told(signum)
        self.stop(signum)

    def _pass_on(self, signum: signal.Signals, now: float) -> None:
        for rank in self._running():
            rank.signal(signum)
        self._kill_at = min(self._kill_at, now + self._patience.save_seconds)

    def _collect(self, running: Sequence[Rank]) -> None:
        for rank in running:
            if rank.collect() and rank.exit_code:
                if not rank.ended_by_us:
                    say(f"rank {rank.number} (process {rank.process.pid}) {how_it_ended(rank.exit_code)}")
                if not self._failure_seen:
                    self._failure_seen = True
                    self._term_at = time.monotonic() + self._patience.peer_seconds
                    if self._link:
                        self._link.failed(rank)
        # Ranks' descendants that lost their parent have come to us; ended ones must not pile up.
        ours = {rank.process.pid for rank in self._ranks}
        reap(children_of(os.getpid()) - self._spared - ours)

    def _end_peers(self, now: float) -> None:
        self._term_at = NEVER
        for rank in self._running():
            say(f"rank {rank.number} is still running: ending it, because another rank has ended")
            rank.ended_by_us = True
            rank.signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, now + self._patience.kill_seconds)

    def _kill(self, now: float) -> None:
        self._kill_at = NEVER
        self._give_up_at = now + _KILLED_BUT_ALIVE_SECONDS
        for rank in self._running():
            if self.ctrl_c_count <= 1:
                say(f"rank {rank.number} did not end in time: killing it; it may not have saved")
            rank.ended_by_us = True
            rank.kill()


def start_ranks(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], inbox: Inbox, ranks: list[Rank]
) -> None:
    """Start `command` once for each environment and append to `ranks`. Rank 0 gets our own output."""
    with inbox.held():
        for environment in environments:
            number = int(environment["RANK"])
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
            ranks.append(Rank(number, process))


def relay_output(ranks: Sequence[Rank]) -> list[threading.Thread]:
    # Started after the last fork: a fork while another thread runs may copy a lock that it holds.
    relays = []
    for rank in ranks:
        if rank.process.stdout is not None:
            prefix = f"[rank {rank.number}] ".encode()
            thread = threading.Thread(target=relay, args=(rank.process.stdout, prefix), daemon=True)
            thread.start()
            relays.append(thread)
    return relays


def relay(source: BinaryIO, prefix: bytes) -> None:
    """Lines of `source` to stderr, each after `prefix`, until it ends."""
    if sys.stderr.isatty():
        prefix = b"\r\x1b[K" + prefix  # over rank 0's progress line, which comes back with its next step
    with source:
        while line := source.readline(_LONGEST_LINE):
            data = prefix + line.rstrip(b"\r\n") + b"\n"
            # When nobody reads us any more, go on reading: the rank must not block on a full pipe.
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(2, data) :]


def end_all(ranks: Sequence[Rank], spared: set[int]) -> None:
    """Kill the ranks that run, and all that ranks started, but `spared`."""
    for rank in ranks:
        if rank.exit_code is None:
            rank.kill()
            rank.exit_code = rank.process.wait()
    if left := end_children(spare=spared, seconds=10.0):
        say(f"processes {sorted(left)}, started by the ranks, do not end even when killed")


def how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "; out of memory? see `dmesg`" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
