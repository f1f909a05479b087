"""The trainer's side of loader workers: started, fed, watched, replaced once, and ended. Called by source.py.

Workers come from a fork server. Plain fork would copy a trainer that holds CUDA contexts, NCCL and OpenMP
threads, of which only the forking thread survives in the child, with all locks as they stood: such workers
hang now and then. Spawn would import torch anew in each of them, two seconds of a core every time. The fork
server imports once, in a clean process without threads, and forks workers from there in milliseconds.

A worker that dies, freezes or hangs is noticed while its answer is waited for, ended, and started again
with the tasks that it owes, in their order. The second time within `GRACE_TASKS` the run ends.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import select
import signal
import sys
import threading
from collections import deque
from multiprocessing import forkserver, resource_tracker
from multiprocessing import util as multiprocessing_util
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.prepare import Arrays, Origin, Preparer, Wanted
from pretrain.data.shared import Arena, Room
from pretrain.data.tasks import Task
from pretrain.data.watch import Watch
from pretrain.data.worker import STOP_SIGNALS, Assigned, Done, Failed, work
from pretrain.data.worker_folder import take_worker_folder
from pretrain.errors import DataError, PretrainError, WorkerError

GRACE_TASKS = 1000  # a worker that is lost this many tasks (of all workers) after the last is the first again
_POLL_SECONDS = 0.5
_END_SECONDS = 5.0  # for a killed process to be gone; one that waits for a dead disk takes longer


def worker_context() -> Any:
    """The multiprocessing context that workers are made in; its server runs when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.data.fork_server", "pretrain.data.loader"])
    take_worker_folder()
    # The server and all that it forks inherit a mask in which these signals wait for ever: a worker
    # must not fall to Ctrl-C before it gets as far as become_worker. Blocked here, not ignored, so
    # that one which arrives meanwhile reaches this process afterwards.
    # The resource tracker comes first: older Pythons unblock both signals when they have started it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


class Answer(NamedTuple):
    """A task's samples. The arrays are views of shared memory: copy before the worker's next `submit`."""

    arrays: Arrays
    unreadable: list[Origin]
    counters: dict[str, float]


class _LostError(Exception):
    """A worker is gone or useless; says how."""


class WorkerPool:
    """`workers` processes. Each takes tasks through `submit`, at most `depth` at a time, and gives their
    answers, in their order, through `receive`.

    task_samples: the most that a task holds. timeout_seconds: of decoding one sample, or of no sign of life.
    """

    def __init__(
        self, preparer: Preparer, *, workers: int, depth: int, task_samples: int, timeout_seconds: float
    ) -> None:
        self._preparer, self._timeout_seconds = preparer, timeout_seconds
        # One slot more: substitutes are prepared while all others are taken.
        self._room = Room(depth + 1, task_samples, Arrays.layout(preparer.transform))
        self._tasks_answered, self._last_loss_at = 0, -GRACE_TASKS
        self._last_culprit = ""
        self.restarts = 0
        self._out_of_memory_kills = _out_of_memory_kills()
        self._workers: list[_Worker] = []
        # multiprocessing joins its children when a process exits, for ever if need be. Finalizers of a
        # priority of 0 or more run before that.
        self._finalizer = multiprocessing_util.Finalize(self, _stop, args=(self._workers,), exitpriority=10)
        for number in range(workers):
            self._workers.append(self._start(number))

    def submit(self, number: int, task: Task) -> None:
        self._workers[number].give(task)

    def receive(self, number: int) -> Answer:
        """The answer to that worker's oldest task. Raises what reading raised; WorkerError or DataError if
        the worker was lost, again after it was started again.
        """
        while True:
            worker = self._workers[number]
            try:
                unreadable = []
                while not isinstance(message := self._await(worker), Done):
                    unreadable.append(_raised(message))
            except _LostError as lost:
                self._restart(number, str(lost))
                continue
            assigned = worker.owed.popleft()
            self._tasks_answered += 1
            arrays = worker.slots[assigned.slot].head(len(assigned.task.positions))
            return Answer(arrays, unreadable, message.counters)

    def substitute(self, number: int, wanted: Wanted) -> tuple[Origin, Arrays]:
        """One sample, out of turn, by that worker; see `receive`."""
        while True:
            worker = self._workers[number]
            try:
                try:
                    worker.urgent.send(wanted)
                except OSError:
                    raise _LostError(self._how_it_ended(worker)) from None
                origin: Origin = _raised(self._await(worker, urgent=True))
            except _LostError as lost:
                self._restart(number, str(lost))
                continue
            return origin, worker.slots[-1].head(1)

    def stop(self) -> None:
        self._finalizer()

    def _start(self, number: int) -> _Worker:
        return _Worker(number, self._preparer, self._room)

    def _await(self, worker: _Worker, *, urgent: bool = False) -> Any:
        """The worker's next message. While an urgent one is waited for, others are kept: a worker whose
        messages nobody takes gets no further.
        """
        watch = Watch(worker.arena.pulse, timeout_seconds=self._timeout_seconds)
        try:
            while urgent or not worker.inbox:
                ready = wait([worker.tasks, worker.urgent], timeout=_POLL_SECONDS)
                if worker.urgent in ready:
                    return worker.urgent.recv()
                if worker.tasks in ready:
                    worker.inbox.append(worker.tasks.recv())
                elif problem := watch.look():
                    raise _LostError(f"{worker} {problem}")
        except (EOFError, OSError):
            raise _LostError(self._how_it_ended(worker)) from None
        return worker.inbox.popleft()

    def _how_it_ended(self, worker: _Worker) -> str:
        worker.process.join(2)  # its pipe closes a moment before its end is known
        code = worker.process.exitcode
        if code is None or code == 255:  # what multiprocessing says when the fork server died, too
            how = "ended, and nobody knows how"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        pulse = worker.arena.pulse
        if pulse.name:
            how += f" while it decoded {pulse.name}"
        if code == -signal.SIGKILL:
            kills = _out_of_memory_kills()
            if kills > self._out_of_memory_kills:
                how += (
                    "; the kernel ended processes meanwhile because memory ran out: take fewer data.workers"
                )
            else:
                how += "; if the system's log says out of memory, take fewer data.workers"
            self._out_of_memory_kills = kills
        return f"{worker} {how}"

    def _restart(self, number: int, problem: str) -> None:
        """Put a new worker in that one's place, with what it owes. Raises if the last loss was too near."""
        worker = self._workers[number]
        culprit = worker.arena.pulse.name  # the sample that it was decoding
        worker.end()
        if culprit and culprit == self._last_culprit:
            raise DataError(
                f"{problem}; a worker before it met its end at the same sample: look at that image, and "
                "exclude it or index again without it"
            )
        if self._tasks_answered - self._last_loss_at < GRACE_TASKS:
            raise WorkerError(
                f"{problem}; a worker was lost and started again {self._tasks_answered - self._last_loss_at} "
                "tasks before: start the run again once the cause is found, it goes on from its checkpoint"
            )
        self._last_loss_at, self._last_culprit = self._tasks_answered, culprit
        self.restarts += 1
        print(
            f"pretrain: {problem}; it is started again, the order of samples stays as it is",
            file=sys.stderr,
            flush=True,
        )
        self._workers[number] = fresh = self._start(number)
        for assigned in worker.owed:
            fresh.give(assigned.task)


class _Worker:
    """One worker's process, pipes and memory, as the trainer holds them."""

    def __init__(self, number: int, preparer: Preparer, room: Room) -> None:
        self.number = number
        context = worker_context()
        self.tasks, their_tasks = context.Pipe()
        self.urgent, their_urgent = context.Pipe()
        self.arena = Arena(room)
        self.slots = [self.arena.slot(slot) for slot in range(room.slots)]
        self.owed: deque[Assigned] = deque()  # oldest first
        self.inbox: deque[Any] = deque()  # messages that came and were not asked for yet
        self._given = 0
        # The environment as it is now: the fork server has the one that it was started in. And pickled, for
        # what is in it may look at the environment as soon as it is there.
        args = (their_tasks, their_urgent, self.arena, dict(os.environ), pickle.dumps(preparer))
        self.process = context.Process(target=work, args=args, daemon=True)
        self.process.start()
        for sent in (their_tasks, their_urgent):
            sent.close()  # so that the pipes end with the worker
        self.arena.close_descriptor()
        # Not by number: when the fork server is dead, nobody here knows whether a number was used again.
        self._handle = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None
        self._outbox: queue.SimpleQueue[Assigned | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=_send_all, args=(self._outbox, self.tasks), daemon=True)
        self._sender.start()

    def __str__(self) -> str:
        return f"loader worker {self.number} (process {self.process.pid})"

    def give(self, task: Task) -> None:
        assigned = Assigned(self._given % (len(self.slots) - 1), task)
        self._given += 1
        self.owed.append(assigned)
        self._outbox.put(assigned)  # sending might wait: for a worker that is frozen, for ever

    def end(self) -> None:
        """Workers are killed: they ignore SIGTERM, one may be waiting for a store, and none holds anything
        that a kill would damage (the cache drops what a dead writer left).
        """
        self.kill()
        self.process.join(_END_SECONDS)
        self._outbox.put(None)
        self._sender.join(_END_SECONDS)
        for connection in (self.tasks, self.urgent):
            connection.close()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def kill(self) -> None:
        if self._handle is None:
            self.process.kill()
            return
        try:
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        except ProcessLookupError:
            return
        gone = select.poll()
        gone.register(self._handle, select.POLLIN)
        gone.poll(_END_SECONDS * 1000)


def _stop(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _send_all(outbox: queue.SimpleQueue[Assigned | None], connection: Connection) -> None:
    while (assigned := outbox.get()) is not None:
        try:
            connection.send(assigned)
        except OSError:  # the worker is gone: whoever waits for its answer finds out
            return


def _raised(message: Any) -> Origin:
    if isinstance(message, PretrainError):
        raise message
    if isinstance(message, Failed):
        raise RuntimeError(f"a loader worker failed:\n{message.traceback}")
    assert isinstance(message, Origin), f"a worker says {message!r:.80}"
    return message


def _out_of_memory_kills() -> int:
    """How many processes the kernel has ended since it started because memory ran out; 0 if it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
