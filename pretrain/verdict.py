"""What is wrong with a rank that does not move, and which of several is at fault. Called by watchdog.py.

One rank is judged by its pulse, by what /proc says of its process and by its threads' stacks; the
ranks together by comparing what their watchdogs found. No clock is compared with another process's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.pulse import BEAT_SECONDS, PHASES, Sight, limit_of

_LONGEST_LOOK = (
    2.0  # seconds; a longer one means that the watchdog was stopped itself, and its rank perhaps too
)
_MOST_NAMED = 8  # ranks or hosts in a sentence
_NO_BEAT_SECONDS = 6 * BEAT_SECONDS

# Kinds of trouble, the surest first.
STOPPED, UNINTERRUPTIBLE, HELD, STUCK, WAITING = "stopped", "uninterruptible", "held", "stuck", "waiting"
_SURE = (STOPPED, UNINTERRUPTIBLE, HELD)
_COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
_DEVICE_READ = (
    "/pretrain/distributed.py"  # where a step's sums come back from a device that exchanges them itself
)
_TOP_FRAMES = 4  # the innermost of a thread: what it is in, not how it came there


class Stall:
    """For how long a rank has not moved, as far as we looked: a machine that slept is not a rank that hangs."""

    def __init__(
        self,
        sight: Sight,
        *,
        step_seconds: float,
        start_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._step_seconds, self._start_seconds, self._clock = step_seconds, start_seconds, clock
        self._looked_at, self.sight = clock(), sight
        self.seconds = self.without_beat = self.stopped_seconds = 0.0

    def look(self, sight: Sight, *, is_stopped: bool = False) -> None:
        """is_stopped: the system lets the process do nothing (`Process.is_stopped`)."""
        now, before = self._clock(), self.sight
        passed = min(now - self._looked_at, _LONGEST_LOOK)
        self._looked_at, self.sight = now, sight
        moved = sight.changes != before.changes
        self.seconds = 0.0 if moved else self.seconds + passed
        self.without_beat = 0.0 if sight.beats != before.beats else self.without_beat + passed
        self.stopped_seconds = self.stopped_seconds + passed if is_stopped and not moved else 0.0

    @property
    def limit(self) -> float:
        """Seconds without a move that the rank may take where it is; stopped, it is at nothing that takes longer."""
        if self.stopped_seconds >= self._step_seconds:
            return self._step_seconds
        return limit_of(self.sight, step_seconds=self._step_seconds, start_seconds=self._start_seconds)

    @property
    def setting(self) -> str:
        """What the limit is called in a recipe."""
        return "watchdog.start_seconds" if self.limit == self._start_seconds else "watchdog.step_seconds"

    @property
    def is_expired(self) -> bool:
        return self.seconds >= self.limit

    @property
    def is_held(self) -> bool:
        """Not even a thread that does nothing else gets to run."""
        return self.without_beat >= min(_NO_BEAT_SECONDS, 0.6 * self.limit)


@dataclass(frozen=True)
class Process:
    """What /proc says of a process: its main thread's state letter, and the CPU time it has used."""

    state: str
    ticks: int

    @property
    def is_stopped(self) -> bool:
        return self.state in "Tt"

    @classmethod
    def look_at(cls, pid: int) -> Process:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return cls("?", 0)
        fields = stat.rpartition(")")[2].split()  # the name, in brackets, may hold anything
        return cls(fields[0], int(fields[11]) + int(fields[12]))


def kind_of(process: Process, stall: Stall, stacks: str) -> str:
    """`stacks`: what faulthandler wrote of the rank's threads, "" if nothing came."""
    if process.is_stopped:
        return STOPPED
    if stall.is_held:
        return UNINTERRUPTIBLE if process.state == "D" else HELD
    if process.state == "D":
        return UNINTERRUPTIBLE
    return WAITING if is_in_collective(stacks) else STUCK


def is_in_collective(stacks: str) -> bool:
    """Is a thread inside torch's or DeepSpeed's communication? That is where one waits for peers."""
    top = 0
    for line in stacks.splitlines():
        if not line.startswith("  File "):
            top = 0
            continue
        top += 1
        if top <= _TOP_FRAMES and any(part in line for part in _COLLECTIVES):
            return True
        if top == 1 and _DEVICE_READ in line:
            return True
    return False


def describe(kind: str, *, busy: bool) -> str:
    """`busy`: the process uses the CPU."""
    if kind == STOPPED:
        return "is stopped (SIGSTOP, or a debugger)"
    if kind == UNINTERRUPTIBLE:
        return "is in uninterruptible sleep (a disk or a network file system does not answer)"
    if kind == HELD:
        how = "and uses the CPU" if busy else "and sleeps"
        return f"does not get to run Python: native code holds the interpreter's lock {how}"
    if kind == WAITING:
        return "waits for its peers in a collective"
    return "is stuck"


def threads_in_proc(pid: int) -> str:
    """What the kernel says of each thread; for a process that cannot dump its own stacks."""
    lines = []
    for thread in sorted(Path(f"/proc/{pid}/task").glob("*")):
        said = {}
        for name in ("comm", "stat", "wchan", "syscall", "stack"):
            try:
                said[name] = (thread / name).read_text().strip()
            except OSError:  # not all are there for everybody
                continue
        state = said.get("stat", "").rpartition(")")[2].split()[:1]
        lines.append(
            f"thread {thread.name} ({said.get('comm', '?')}): state {''.join(state) or '?'}, waits in "
            f"{said.get('wchan', '?')}, system call {said.get('syscall', '?')}"
        )
        lines += [f"    {frame}" for frame in said.get("stack", "").splitlines()]
    return "\n".join(lines) + "\n"


def ranks_at_fault(records: Mapping[int, Mapping[str, Any]], world_size: int) -> list[int]:
    """The ranks that the others wait for, from what the watchdogs of all have found so far.

    Those that cannot run come first, then those that are stuck (the least advanced of them), then
    those that nobody has heard of. Empty when all wait, or are stuck in the same place: no rank is
    to blame, the network may be.
    """
    sure = sorted(rank for rank, record in records.items() if record["kind"] in _SURE)
    if sure:
        return sure
    stuck = {rank: _progress(record) for rank, record in records.items() if record["kind"] == STUCK}
    if stuck and (len(stuck) < world_size or world_size == 1 or len(set(stuck.values())) > 1):
        least = min(stuck.values())
        return sorted(rank for rank, progress in stuck.items() if progress == least)
    return sorted(set(range(world_size)) - set(records))


def _progress(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["step"], PHASES.index(record["phase"])


def conclusion(records: Mapping[int, Mapping[str, Any]], hosts: Sequence[str]) -> str:
    """For people: which rank, on which host, where, and what ails it. `hosts`: of all ranks, in their order."""
    guilty = ranks_at_fault(records, len(hosts))
    known = [rank for rank in guilty if rank in records]
    if known:
        return "; ".join(records[rank]["said"] for rank in known[:_MOST_NAMED]) + (
            " …" if len(known) > _MOST_NAMED else ""
        )
    if guilty:
        return (
            f"nothing is heard of {_by_host(guilty, hosts)}: gone with the host, cut off, or writing elsewhere "
            "(a run_dir that hosts do not share)"
        )
    where = _by_host(sorted(records), hosts)
    if len(set(hosts)) == 1:
        return f"all ranks wait for each other ({where}); their stacks say in which collective each is"
    return f"all ranks wait for each other: the network between the hosts does not carry ({where})"


def _by_host(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    named = [f"{_ranks(own)} on host {host}" for host, own in list(by_host.items())[:_MOST_NAMED]]
    return ", ".join(named) + (" …" if len(by_host) > _MOST_NAMED else "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_NAMED])) + (" …" if len(ranks) > _MOST_NAMED else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
