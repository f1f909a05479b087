"""The process beside a rank that ends it when it does not move. Started by pulse.py; knows no torch.

    RUN/attempts/3/watchdog-1.json   what it found: rank, host, step, phase, kind of trouble, who is at fault
    RUN/attempts/3/stacks-1.txt      the stacks of all the rank's threads, or what /proc says of a stopped process
    RUN/attempts/3/exit-1.json       written for the rank, which cannot any more

A rank that waits for its peers is given a few seconds more: once the one at fault is gone it can end
by itself, and say so. The watchdog dies with its rank.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.errors import EXIT_CRASHED
from pretrain.pulse import DUMP_SIGNAL, Sight, read_sight
from pretrain.verdict import (
    STOPPED,
    WAITING,
    Process,
    Stall,
    conclusion,
    describe,
    kind_of,
    ranks_at_fault,
    threads_in_proc,
)

LOOK_SECONDS = 0.25
ASKED_SECONDS = 1.0
PEERS_SECONDS = 5.0  # for the other watchdogs to write what they found, and for the culprit to be ended
_BUSY_SECONDS = 0.2  # over which the rank's use of the CPU is measured
_DUMP_SECONDS = 2.0
_WRITE_SECONDS = 1.5  # the run's folder may be on the very file system that hangs
_ALL_COMPARE_UP_TO = 64  # ranks; above, only the first rank of each host reads the others' records
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Watchdog:
    """Looks at one rank until it ends, or ends it."""

    def __init__(
        self,
        *,
        pid: int,
        folder: Path,
        rank: int,
        hosts: list[str],
        step_seconds: float,
        start_seconds: float,
        pulse: mmap.mmap,
        stacks: int,
    ) -> None:
        self._pid, self._folder, self._rank, self._hosts = pid, folder, rank, hosts
        self._pulse, self._stacks = pulse, stacks
        self._stall = Stall(read_sight(pulse), step_seconds=step_seconds, start_seconds=start_seconds)
        self._step_seconds = step_seconds
        self._record: dict[str, Any] | None = None  # of the stall at hand
        self._asked_next = 0.0

    def run(self) -> None:
        """Until the rank is gone."""
        while self._rank_lives():
            time.sleep(LOOK_SECONDS)
            self._look()
            if self._record is not None and self._stall.seconds == 0.0 and self._stall.sight.phase != "end":
                self._take_back()
            if self._stall.is_expired:
                self._end_rank()
            elif self._record is None and self._is_asked():
                self._find_out()

    def _look(self) -> None:
        self._stall.look(read_sight(self._pulse), is_stopped=Process.look_at(self._pid).is_stopped)

    def _rank_lives(self) -> bool:
        return os.getppid() == self._pid

    def _is_asked(self) -> bool:
        """Has a peer's watchdog run out of patience, while ours is getting there? Then it wants to know of us."""
        if self._stall.seconds < self._step_seconds / 2 or self._stall.sight.phase == "end":
            return False
        if time.monotonic() < self._asked_next:
            return False
        self._asked_next = time.monotonic() + ASKED_SECONDS
        asked = False

        def look() -> None:
            nonlocal asked
            asked = any(self._folder.glob("watchdog-*.json"))

        _bounded(look)
        return asked

    def _find_out(self) -> dict[str, Any]:
        """What ails the rank, written down for the other watchdogs and for people."""
        stall, sight = self._stall, self._stall.sight
        before = Process.look_at(self._pid)
        time.sleep(_BUSY_SECONDS)
        later = Process.look_at(self._pid)
        # A stopped process cannot answer. One that is held is not asked before its time is over: the signal ends some
        # system calls, and it should be its own doing if it goes on.
        silent = before.is_stopped or (stall.is_held and not stall.is_expired)
        stacks = "" if silent else self._dump()
        now = Process.look_at(self._pid)
        kind = kind_of(now, stall, stacks)
        host = self._hosts[self._rank]
        busy = later.ticks - before.ticks > _BUSY_SECONDS / 2 * os.sysconf("SC_CLK_TCK")
        ailment = describe(kind, busy=busy)
        record = {
            "rank": self._rank,
            "host": host,
            "pid": self._pid,
            "step": sight.step,
            "phase": sight.phase,
            "seconds": round(stall.seconds, 1),
            "kind": kind,
            "said": f"rank {self._rank} on host {host} {ailment}, in {_where(sight)}",
            "expired": stall.is_expired,
            "at_fault": [] if kind == WAITING else [self._rank],
            "time": time.time(),
        }
        if kind == STOPPED or not stacks:
            stacks += threads_in_proc(self._pid)
        self._record = record
        self._write(f"stacks-{self._rank}.txt", stacks)
        self._write_record()
        return record

    def _take_back(self) -> None:
        """It moves after all, and nobody has ended it."""
        self._record = None
        _bounded(lambda: (self._folder / f"watchdog-{self._rank}.json").unlink(missing_ok=True))

    def _end_rank(self) -> None:
        ends_at = time.monotonic() + PEERS_SECONDS
        record = self._find_out()
        limit = f"{self._stall.limit:g} s ({self._stall.setting})"
        if record["kind"] == WAITING and len(self._hosts) > 1:
            say(f"{record['said']}; it has not moved for {limit}: looking for the one that it waits for")
            if self._compare(ends_at):
                return
            reason = f"{record['said']} and has not moved for {limit}: {record['conclusion']}"
        else:
            reason = f"{record['said']}; it has not moved for {limit}"
        say(f"{reason}. Ending it; see {self._folder}/stacks-{self._rank}.txt")
        self._write_exit(reason, waits=record["kind"] == WAITING)
        os.kill(self._pid, signal.SIGKILL)
        while self._rank_lives():  # we die with it, unless it sleeps where SIGKILL does not reach
            time.sleep(LOOK_SECONDS)

    def _compare(self, ends_at: float) -> bool:
        """Wait for what the others' watchdogs found, and for the rank to end by itself when its peer is gone.
        Says whether it has moved.
        """
        record = self._record
        assert record is not None, "the rank was judged"
        compares = len(self._hosts) <= _ALL_COMPARE_UP_TO or os.environ.get("LOCAL_RANK", "0") == "0"
        records: dict[int, Any] = {}
        told: list[int] = []
        while time.monotonic() < ends_at and self._rank_lives():
            if compares:
                _bounded(lambda: records.update(read_records(self._folder)))
                records[self._rank] = record
                guilty = [rank for rank in ranks_at_fault(records, len(self._hosts)) if rank in records]
                if guilty and guilty != told:  # at once: when it ends, so do we
                    told = guilty
                    record["at_fault"] = guilty
                    record["conclusion"] = conclusion(records, self._hosts)
                    self._write_record()
            time.sleep(LOOK_SECONDS)
            self._look()
            if self._stall.seconds == 0.0:
                return True
        if compares:
            record["at_fault"] = ranks_at_fault(records, len(self._hosts))
            record["conclusion"] = conclusion(records, self._hosts)
        else:
            record["conclusion"] = "the record of each host's first rank says for which one"
        self._write_record()
        return False

    def _dump(self) -> str:
        """The rank's stacks, by its own C code: that runs while Python does not."""
        size = os.fstat(self._stacks).st_size
        started = size
        os.kill(self._pid, DUMP_SIGNAL)
        deadline = time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.1)
            grown = os.fstat(self._stacks).st_size
            if grown > started and grown == size:
                break
            size = grown
        return os.pread(self._stacks, max(0, size - started), started).decode(errors="replace")

    def _write_record(self) -> None:
        self._write(f"watchdog-{self._rank}.json", json.dumps(self._record) + "\n")

    def _write_exit(self, reason: str, *, waits: bool) -> None:
        if self._stall.sight.phase == "end":
            return  # it has said itself how it ended; it only does not go
        record = {
            "rank": self._rank,
            "host": self._hosts[self._rank],
            "pid": self._pid,
            "code": EXIT_CRASHED,
            "reason": f"watchdog: {reason}",
            "error": "LostPeerError" if waits else "Watchdog",  # who waits has not begun it
            "time": time.time(),
        }
        self._write(f"exit-{self._rank}.json", json.dumps(record) + "\n")

    def _write(self, name: str, text: str) -> None:
        def write() -> None:
            temporary = self._folder / f".{name}.tmp"
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(self._folder / name)

        if not _bounded(write):
            say(f"{self._folder}/{name} cannot be written")


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """What the watchdogs of an attempt have found, by rank. Files that are no records are left out."""
    records = {}
    for path in sorted(folder.glob("watchdog-*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records[int(record["rank"])] = record
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return records


def ended_ranks(attempts: Path, *, before: int) -> list[tuple[int, dict[str, Any]]]:
    """(attempt, record) of each rank that a watchdog ended before the attempt `before`. attempts: the run's folder of
    them."""
    found = []
    for folder in attempts.iterdir():
        if folder.name.isdigit() and int(folder.name) < before:
            records = read_records(folder).values()
            found += [(int(folder.name), record) for record in records if record.get("expired")]
    return found


def _where(sight: Sight) -> str:
    return f"phase {sight.phase} after step {sight.step}"


def _bounded(action: Callable[[], object]) -> bool:
    """Do it, but do not wait for it for ever. Says whether it was done."""
    done = threading.Event()

    def run() -> None:
        try:
            action()
        except OSError:  # a full disk, or a folder that went away, must not keep us from ending the rank
            return
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_WRITE_SECONDS)
    return done.is_set()


def say(text: str) -> None:
    # Nobody may read what we print any more.
    _bounded(lambda: os.write(2, f"pretrain watchdog: {text}\n".encode()))


def main() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the rank's to mind
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    task = json.load(sys.stdin)
    pulse = mmap.mmap(task.pop("pulse"), 0)
    Watchdog(**{**task, "folder": Path(task["folder"]), "pulse": pulse}).run()


if __name__ == "__main__":
    main()
