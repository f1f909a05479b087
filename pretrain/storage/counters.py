"""What this process did with stores and caches, in numbers. Counted in storage/, read by the loader's workers,
which send the difference since their last part to the trainer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

NAMES = (
    "requests",  # asked of a store, those that failed included
    "retries",  # of them, made because an earlier one failed
    "read_bytes",  # of bodies, as they came in
    "retried_bytes",  # that broken answers still owed, and others brought; nothing is brought twice
    "wait_seconds",  # before retries, and for chunks that a neighbour fetches
    "credential_refreshes",  # that this process asked a provider for
    "cache_hits",  # chunks found in the node's cache, or fetched there by a neighbour while we waited
    "cache_misses",  # chunks that this process fetched
    "cache_evictions",  # files that this process removed to make room
    "cache_evicted_bytes",
    "cache_bypasses",  # chunks kept in memory because the cache could not take them
    "cache_damaged",  # cached files that differed from what was written
)


class Counters:
    """Sums under names, safe to add to from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = dict.fromkeys(NAMES, 0.0)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return dict(self._sums)


_counters = Counters()  # the one of this process: all its stores and caches add to it
add, snapshot = _counters.add, _counters.snapshot


def since(before: Mapping[str, float]) -> dict[str, float]:
    """What was added after the snapshot `before`."""
    return {name: value - before[name] for name, value in snapshot().items()}
