"""The processes that prepare samples: how they start, what they ignore, and that none outlives its parent.

Called by loader.py.

Workers come from a fork server. Plain fork would copy a trainer that holds CUDA contexts, NCCL and OpenMP
threads, of which only the forking thread survives in the child, with all locks as they stood: such workers
hang now and then. Spawn would import torch anew in each of them, two seconds of a core every time. The fork
server imports once, in a clean process without threads, and forks workers from there in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing import util as multiprocessing_util
from multiprocessing.connection import wait
from typing import Any

import torch

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def worker_context() -> Any:
    """The multiprocessing context that workers are made in; its server runs when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.data.loader"])
    # The server and all that it forks inherit a mask in which these signals wait for ever: a worker
    # must not fall to Ctrl-C before it gets as far as become_worker. Blocked here, not ignored, so
    # that one which arrives meanwhile reaches this process afterwards.
    # The resource tracker comes first: older Pythons unblock both signals when they have started it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def become_worker(worker: int) -> None:
    """Run first in each worker. Ctrl-C and SIGTERM are the parent's to handle: it may need more batches
    to finish a step and save. A worker ends when its parent stops it, or is gone.
    """
    for stop in _STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    torch.set_num_threads(1)  # a worker is one core's worth
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are children"
    # The kernel's parent-death signal would not do: the kernel's parent of a worker is the fork
    # server, which lives as long as its workers do.
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(parent_sentinel: int) -> None:
    wait([parent_sentinel])
    os._exit(1)  # without clean-up, which may wait for the parent


class WorkerGuard:
    """Stops the workers of one DataLoader iterator, at the latest when this process exits.

    They are killed: they ignore SIGTERM, one may be waiting for a store, and none holds anything that a
    kill would damage (the cache drops what a dead writer left).
    """

    def __init__(self, iterator: Any) -> None:
        # multiprocessing joins its children when a process exits, for ever if need be. Finalizers of a
        # priority of 0 or more run before that.
        self._iterator = iterator
        self._finalizer = multiprocessing_util.Finalize(self, _stop, args=(iterator,), exitpriority=10)

    def dead(self) -> str:
        """Which workers ended by themselves, and how; empty if none did."""
        # A line to a dead worker breaks a moment before its end is known.
        wait([worker.sentinel for worker in self._iterator._workers], timeout=2)
        ended = [worker for worker in self._iterator._workers if not worker.is_alive()]
        return ", ".join(f"process {worker.pid} with exit code {worker.exitcode}" for worker in ended)

    def stop(self) -> None:
        self._finalizer()


def _stop(iterator: Any) -> None:
    for worker in iterator._workers:  # no public way leads to them
        worker.kill()
    iterator._shutdown_workers()
