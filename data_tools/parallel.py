"""Run a function over many tasks in processes of this machine. Called by the data tools.

Workers come from a fork server, as the loader's do: plain fork copies threads' locks, and spawn would
import everything anew in each. They ignore Ctrl-C, which is their parent's to handle, and none outlives it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, TypeVar

from data_tools.progress import Progress
from pretrain.errors import PretrainError, UsageError
from pretrain.storage import Storage, open_storage

Task = TypeVar("Task")
Result = TypeVar("Result")

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_POLL_SECONDS = 0.2
_STOP_SECONDS = 10.0  # what workers get to put down what they hold


class _Stopped(BaseException):
    """In a worker: the parent does not want the rest."""


class _Here:
    """Of the process that a task runs in: whom its reports go to, and whether it is to stop."""

    tell: Callable[[int], None] | None = None
    stop: Any = None


def report(count: int) -> None:
    """Called by a task's function with what it has done since the last time; ends it if it is to stop."""
    if _Here.stop is not None and _Here.stop.is_set():
        raise _Stopped
    if _Here.tell is not None:
        _Here.tell(count)


@functools.lru_cache(maxsize=8)
def task_storage(url: str) -> Storage:
    """The store that a task works on, kept from task to task: a client of its own for each would cost a
    tenth of a second."""
    return open_storage(url)


def default_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_processes(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= 1024:
        raise UsageError(f"--processes {value}: from 1 to 1024 is possible")
    return value


def processes_for(asked: int | None, *, tasks: int, total_bytes: int) -> int:
    """How many to start: what was asked for; else one a core, if each has work for some seconds."""
    if asked is None:
        asked = min(default_processes(), total_bytes >> 25)  # 32 MiB
    return max(1, min(asked, tasks))


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    processes: int,
    progress: Progress,
    preload: tuple[str, ...] = (),
) -> Iterator[Result]:
    """What `function` returns for each task, in the order in which they finish.

    With one process all is done in this one. `progress` is told what the function reports.

    Raises what the function raises, after the others were stopped; PretrainError if a worker dies.
    """
    task_storage.cache_clear()  # the environment may say something else than it did
    if processes == 1:
        yield from _run_here(function, tasks, progress)
        return
    context = _context(preload)
    done, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_become_worker, initargs=(dict(os.environ), done, stop)
    )
    told = 0
    left = iter(tasks)
    waiting: set[Future[Result]] = set()
    try:
        while True:
            while len(waiting) < 2 * processes and (task := next(left, None)) is not None:
                waiting.add(pool.submit(function, task))
            if not waiting:
                break
            finished, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            progress.add(done.value - told)
            told = done.value
            for future in finished:
                yield future.result()
        progress.add(done.value - told)
    except BrokenProcessPool as error:
        raise PretrainError(
            "a worker process died, killed from outside or for memory; run the command again, it goes on "
            "(--processes takes fewer)"
        ) from error
    finally:
        stop.set()
        _end(pool)


def _run_here(
    function: Callable[[Task], Result], tasks: Iterable[Task], progress: Progress
) -> Iterator[Result]:
    for task in tasks:
        before, _Here.tell = _Here.tell, progress.add
        try:
            result = function(task)
        finally:
            _Here.tell = before
        yield result


def _context(preload: tuple[str, ...]) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # The server and all that it forks inherit a mask in which these signals wait for ever. Blocked here,
    # not ignored, so that one which arrives meanwhile reaches this process afterwards.
    # The resource tracker comes first: older Pythons unblock both signals when they have started it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _become_worker(environment: dict[str, str], done: Any, stop: Any) -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()  # the fork server's are those of when it started
    os.environ.update(environment)

    def tell(count: int) -> None:
        with done.get_lock():
            done.value += count

    _Here.tell, _Here.stop = tell, stop
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are children"
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(parent_sentinel: int) -> None:
    connection.wait([parent_sentinel])
    os._exit(1)  # without clean-up, which may wait for the parent


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop the workers: by themselves if they can, so that they remove what they were writing."""
    workers = list((pool._processes or {}).values())  # no public way leads to them
    pool.shutdown(wait=False, cancel_futures=True)
    deadline = time.monotonic() + _STOP_SECONDS
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
