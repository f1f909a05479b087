"""One budget of retries for all processes of a node, so that a store in trouble is not stormed. Called by retry.py.

A token bucket in a file of 16 bytes: the tokens left, and when that was true. A retry takes one; they come
back at a fixed rate, and one at once with every request that succeeded after all. The bucket may go into
debt: who takes from an empty one is told how long to wait, so that the retries of hundreds of processes
come one after another, in the order in which they asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.storage.node import locked, node_folder, open_lock_file

_RECORD = struct.Struct("<dd")  # tokens, and the system-wide monotonic clock's time in seconds
_LARGEST_DEBT = (
    1e6  # more retries than any node has waiting: a debt beyond it is damage, and would never be paid
)
_LOCK_SECONDS = 0.2  # a holder needs microseconds; a frozen one is not waited for


class RetryBudget:
    """`burst` retries at once, then `per_second`, over all processes that name the same `path`.

    path: None, or one that cannot be written, makes a budget of this process alone. Safe for threads, after
    a fork, and for a kill at any moment: the record is replaced by one write, under a lock that dies with
    its holder.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        burst: float,
        per_second: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._burst, self._per_second, self._clock = path, burst, per_second, clock
        self._own = _RECORD.pack(burst, clock())  # where there is no file
        self._own_lock = threading.Lock()

    def take(self) -> float:
        """Take a token. Seconds to wait before it may be used, 0 for at once."""
        return max(0.0, -self._add(-1.0)) / self._per_second

    def give_back(self) -> None:
        """A retry succeeded, or was not made after all."""
        self._add(1.0)

    def _add(self, tokens: float) -> float:
        """Add to the bucket; what is in it then. Negative: a debt."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self._path is not None:
                # Opened anew each time: retries are rare, and a lock belongs to an opening, not to a thread.
                descriptor = open_lock_file(self._path)
                stack.callback(os.close, descriptor)
                if stack.enter_context(locked(descriptor, seconds=_LOCK_SECONDS)):
                    record = self._after(os.pread(descriptor, _RECORD.size, 0), tokens)
                    os.pwrite(descriptor, record, 0)
                    return float(_RECORD.unpack(record)[0])
        with self._own_lock:
            self._own = self._after(self._own, tokens)
            return float(_RECORD.unpack(self._own)[0])

    def _after(self, record: bytes, tokens: float) -> bytes:
        now = self._clock()
        held, since = _RECORD.unpack(record) if len(record) == _RECORD.size else (self._burst, now)
        if not (0 <= since <= now and -_LARGEST_DEBT <= held <= self._burst):
            held, since = self._burst, now  # from before a reboot, of other settings, or no record at all
        refilled = min(self._burst, held + (now - since) * self._per_second)
        return _RECORD.pack(min(self._burst, refilled + tokens), now)


def node_budget(endpoint: str, *, burst: float, per_second: float) -> RetryBudget:
    """The budget that this node's processes share for one endpoint (its URL, or what stands for it)."""
    folder = node_folder()
    name = f"retries-{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}"
    return RetryBudget(folder / name if folder else None, burst=burst, per_second=per_second)
