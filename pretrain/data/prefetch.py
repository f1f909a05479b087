"""Fetch chunks before they are asked for. Called by reader.py, in the process that will read them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

_THREADS = 4
_IDLE_SECONDS = 5.0  # then a thread ends, and with it what it holds of a reader that nobody has any more


@dataclass(frozen=True)
class Job(Generic[Item]):
    """Something to obtain, the number that it goes by, and the bytes that it takes."""

    number: int
    size: int
    item: Item


class Prefetcher(Generic[Item, Value]):
    """A few threads that obtain things ahead of time, under a budget of bytes.

    obtain: turns an item into the thing; called in a thread. keep: whether what came must be held here until
    it is taken (a chunk in memory), or is found elsewhere later (a file of the cache). max_bytes: of what is
    waiting, under way, or held; 0 does nothing ahead of time.

    An error belongs to whoever waits for it. One that nobody waits for is dropped: reading the chunk will
    show it again, or show that it passed.
    """

    def __init__(
        self,
        obtain: Callable[[Item], Value],
        *,
        keep: Callable[[Value], bool],
        max_bytes: int,
        threads: int = _THREADS,
    ) -> None:
        self._obtain, self._keep, self._max_bytes, self._most_threads = obtain, keep, max_bytes, threads
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, Job[Item]] = OrderedDict()
        self._under_way: dict[int, Job[Item]] = {}
        self._wanted: set[int] = set()  # under way, and somebody waits for it
        self._results: OrderedDict[int, tuple[Job[Item], Value | None, BaseException | None]] = OrderedDict()
        self._bytes = 0
        self._idle_threads = self._threads = 0
        self._closed = False

    def ask(self, jobs: Iterable[Job[Item]]) -> None:
        """Begin on what is needed soon, most urgent first. What the budget has no room for is left
        out: it will be asked for again. Returns at once.
        """
        with self._changed:
            jobs = list(jobs)
            self._forget_all_but({job.number for job in jobs})
            for job in jobs:
                if any(job.number in known for known in (self._waiting, self._under_way, self._results)):
                    continue
                if self._closed or self._bytes + job.size > self._max_bytes:
                    break
                self._waiting[job.number] = job
                self._bytes += job.size
                if self._idle_threads < len(self._waiting) and self._threads < self._most_threads:
                    self._threads += 1
                    # A daemon: an exit does not wait for a store that does not answer.
                    threading.Thread(target=self._work, name="prefetch", daemon=True).start()
            self._changed.notify_all()

    def take(self, number: int) -> Value | None:
        """What was obtained, waiting for it if it is under way; None if it was not begun or not kept.

        Raises what obtaining raised while we waited.
        """
        with self._changed:
            if (waiting := self._waiting.pop(number, None)) is not None:
                self._bytes -= waiting.size  # we are quicker
                return None
            if number in self._under_way:
                self._wanted.add(number)
                self._changed.wait_for(lambda: number not in self._under_way)
                self._wanted.discard(number)
            result = self._results.pop(number, None)
            if result is None:
                return None
            job, value, error = result
            self._bytes -= job.size
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Drop all that is waiting or held. What is under way ends by itself, and is dropped then."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._results.clear()
            self._changed.notify_all()

    def _forget_all_but(self, numbers: set[int]) -> None:
        """The reader went elsewhere: what it asked for once, and does not any more, makes room."""
        for number in self._waiting.keys() - numbers:
            self._bytes -= self._waiting.pop(number).size
        for number in self._results.keys() - numbers:
            self._bytes -= self._results.pop(number)[0].size

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle_threads += 1
                self._changed.wait_for(lambda: self._waiting or self._closed, timeout=_IDLE_SECONDS)
                self._idle_threads -= 1
                if self._closed or not self._waiting:
                    self._threads -= 1
                    return
                number, job = self._waiting.popitem(last=False)
                self._under_way[number] = job
            value: Value | None = None
            error: BaseException | None = None
            try:
                value = self._obtain(job.item)
            except BaseException as caught:  # handed to whoever waits, whatever it is
                error = caught
            with self._changed:
                del self._under_way[number]
                wanted = number in self._wanted
                held = value is not None and self._keep(value)
                if not self._closed and (held or (wanted and error is not None)):
                    self._results[number] = (job, value, error)
                else:
                    self._bytes -= job.size
                self._changed.notify_all()
            del value  # not held until the next one comes
