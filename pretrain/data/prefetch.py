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
    under way, or came and was not taken yet; 0 does nothing ahead of time.

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
        """Obtain these, in this order, as the budget has room for them. Returns at once.

        They take the place of what was asked for before and has not begun.
        """
        with self._changed:
            if self._closed or not self._max_bytes:
                return
            wanted = {job.number: job for job in jobs}
            for number in self._results.keys() - wanted.keys():  # the reader went elsewhere
                self._bytes -= self._results.pop(number)[0].size
            busy = self._under_way.keys() | self._results.keys()
            self._waiting = OrderedDict((number, wanted[number]) for number in wanted if number not in busy)
            missing = min(self._most_threads - self._threads, len(self._waiting) - self._idle_threads)
            for _ in range(missing):
                self._threads += 1
                # A daemon: an exit does not wait for a store that does not answer.
                threading.Thread(target=self._work, name="prefetch", daemon=True).start()
            self._changed.notify_all()

    def knows(self, number: int) -> bool:
        """Whether it is under way, or came and was not taken yet."""
        with self._changed:
            return number in self._under_way or number in self._results

    def take(self, number: int) -> Value | None:
        """What was obtained, waiting for it if it is under way; None if it was not begun or not kept.

        Raises what obtaining raised while we waited.
        """
        with self._changed:
            if self._waiting.pop(number, None) is not None:
                return None  # we are quicker
            if number in self._under_way:
                self._wanted.add(number)
                self._changed.wait_for(lambda: number not in self._under_way)
                self._wanted.discard(number)
            result = self._results.pop(number, None)
            if result is None:
                return None
            job, value, error = result
            self._bytes -= job.size
            self._changed.notify_all()
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

    def _has_work(self) -> bool:
        if not self._waiting:
            return False
        # One that is larger than the budget goes alone.
        return not self._bytes or self._bytes + next(iter(self._waiting.values())).size <= self._max_bytes

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle_threads += 1
                found = self._changed.wait_for(
                    lambda: self._has_work() or self._closed, timeout=_IDLE_SECONDS
                )
                self._idle_threads -= 1
                if self._closed or not (found or self._waiting):
                    self._threads -= 1
                    return
                if not found:
                    continue  # there is something to do, and no room for it yet
                number, job = self._waiting.popitem(last=False)
                self._under_way[number] = job
                self._bytes += job.size
            value: Value | None = None
            error: BaseException | None = None
            try:
                value = self._obtain(job.item)
            except BaseException as caught:  # handed to whoever waits, whatever it is
                error = caught
            with self._changed:
                del self._under_way[number]
                wanted = number in self._wanted
                if value is not None and not self._keep(value):
                    value = None  # only that it came is noted
                if not self._closed and (error is None or wanted):
                    self._results[number] = (job, value, error)
                else:
                    self._bytes -= job.size
                self._changed.notify_all()
            del value  # not held until the next one comes
