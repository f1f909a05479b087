"""What runs in a loader worker's process. Started by workers.py.

Tasks come through one pipe and are answered in their order; substitutes for samples that do not decode
come through another and are answered between two samples. Pixels go through shared memory, so that
messages stay short: a short one arrives whole or not at all, and sending it never waits.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch

from pretrain.data.fork_server import forget
from pretrain.data.prepare import Arrays, CounterDeltas, Origin, Preparer, Wanted, storage_counters
from pretrain.data.shared import Arena, SharedPulse
from pretrain.data.tasks import Task
from pretrain.errors import PretrainError

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
BEAT_SECONDS = 0.25
_MESSAGE_BYTES = 8 << 10  # of a traceback


class Assigned(NamedTuple):
    """A task, and the slot of the arena that its samples go to."""

    slot: int
    task: Task


class Done(NamedTuple):
    """The end of a task's answer. Before it come the origins of samples that do not decode."""

    counters: dict[str, float]  # gained since the last one


class Failed(NamedTuple):
    """Something that nobody foresaw."""

    traceback: str


def work(
    tasks: Connection, urgent: Connection, arena: Arena, environment: dict[str, str], pickled_preparer: bytes
) -> None:
    """Until the trainer is gone or ends this process."""
    become_worker()
    os.environ.clear()
    os.environ.update(environment)
    preparer: Preparer = pickle.loads(pickled_preparer)  # from the trainer, never from a file
    pulse = arena.pulse
    threading.Thread(target=_beat, args=(pulse,), daemon=True).start()
    slots = [arena.slot(number) for number in range(arena.room.slots)]
    deltas = CounterDeltas()

    def between() -> None:
        if urgent.poll():
            _substitute(urgent, preparer, slots[-1], pulse)

    gc.freeze()  # what was imported stays: collections need not look at it again and again
    while True:
        pulse.idle()
        try:
            ready = wait([tasks, urgent])
            between()
            if tasks not in ready:
                continue
            assigned: Assigned = tasks.recv()
            _prepare(tasks, assigned, preparer, slots, pulse, between, deltas)
        except (EOFError, OSError):  # the trainer has closed the pipe
            os._exit(0)


def _prepare(
    tasks: Connection,
    assigned: Assigned,
    preparer: Preparer,
    slots: list[Arrays],
    pulse: SharedPulse,
    between: Callable[[], None],
    deltas: CounterDeltas,
) -> None:
    out = slots[assigned.slot].head(len(assigned.task.positions))
    try:
        unreadable = preparer.prepare(assigned.task, out, pulse=pulse, between=between)
    except Exception as error:
        tasks.send(_as_message(error))
        return
    for origin in unreadable:
        tasks.send(origin)
    tasks.send(Done(deltas.take()))


def _substitute(urgent: Connection, preparer: Preparer, out: Arrays, pulse: SharedPulse) -> None:
    wanted: Wanted = urgent.recv()
    try:
        answer: Origin | PretrainError | Failed = preparer.prepare_one(wanted, out, 0, pulse=pulse)
    except Exception as error:
        answer = _as_message(error)
    urgent.send(answer)


def _as_message(error: Exception) -> PretrainError | Failed:
    """As a value: raised in the trainer, where the user is."""
    if isinstance(error, PretrainError):
        return error
    return Failed("".join(traceback.format_exception(error))[-_MESSAGE_BYTES:])


def become_worker() -> None:
    """Ctrl-C and SIGTERM are the parent's to handle: it may need more batches to finish a step and save.
    A worker ends when its parent stops it, or is gone.
    """
    forget()
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    torch.set_num_threads(1)  # a worker is one core's worth
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are children"
    # The kernel's parent-death signal would not do: the kernel's parent of a worker is the fork server, without
    # which workers go on.
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(parent_sentinel: int) -> None:
    wait([parent_sentinel])
    os._exit(1)  # without clean-up, which may wait for the parent


def _beat(pulse: SharedPulse) -> None:
    while True:
        pulse.beat(int(sum(storage_counters().values())))
        time.sleep(BEAT_SECONDS)
