"""Everything that can happen to a supervisor, in one queue: signals, and messages of other hosts.

Used by supervisor.py and whatever waits with it. Python's own handlers may run on any thread's behalf
and in any order with our code; a pipe that the main loop reads has neither problem.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
from collections.abc import Iterator
from typing import Any, Protocol

# SIGUSR1 is what schedulers send ahead of a preemption; it asks for the same as SIGTERM.
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Source(Protocol):
    """Something that can be waited for and then read without waiting."""

    def fileno(self) -> int: ...

    def events(self) -> list[Any]: ...


class Inbox:
    """A context in which ending signals, and the end of children, are only things to read."""

    def __enter__(self) -> Inbox:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._reader, selectors.EVENT_READ)
        # What the caller ignores (SIGHUP under nohup), we and the ranks ignore too.
        self.handled = [s for s in ENDING_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {
            signum: signal.signal(signum, lambda *_: None) for signum in [*self.handled, signal.SIGCHLD]
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._selector.close()
        os.close(self._reader)
        os.close(self._writer)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Ending signals wait until the block is left."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.handled)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def add(self, source: Source) -> None:
        self._selector.register(source, selectors.EVENT_READ, source)

    def remove(self, source: Source) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it was removed before, or is closed
            self._selector.unregister(source)

    def wait(self, seconds: float | None) -> list[Any]:
        """What came, at once or within `seconds` (None: however long it takes): an int for each ending signal, and
        what the sources give. The end of a child only ends the wait."""
        events: list[Any] = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                events += [number for number in os.read(self._reader, 4096) if number in ENDING_SIGNALS]
            else:
                events += key.data.events()
        return events
