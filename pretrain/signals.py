"""Told to stop: remember it until that can be done well. Called by train.py's loop and by cli.py.

SIGTERM (a preemption) and the first Ctrl-C let the step finish and the run save; a second Ctrl-C
aborts at once. Signals reach ranks at different moments: the loop agrees on a step by summing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from pretrain.errors import EXIT_CTRL_C, EXIT_INTERRUPTED

_AGAIN_SECONDS = 0.1  # by then the main thread has long left what swallowed its KeyboardInterrupt


@contextmanager
def ctrl_c_is_not_lost() -> Iterator[None]:
    """Send this process its SIGINT again where Python dropped the KeyboardInterrupt.

    Raised in a destructor or in the callback of a weak reference, which importlib has for each module
    it imports, an exception cannot go on: it ends in `sys.unraisablehook`, and the command would go on
    as if nobody had pressed anything.
    """
    before = sys.unraisablehook
    timers: list[threading.Timer] = []

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        # Not from here: the hook is within what swallows exceptions.
        again = threading.Timer(
            _AGAIN_SECONDS, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        )
        again.daemon = True
        again.start()
        timers.append(again)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()  # what it should have stopped has ended by itself


@contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block instead of inside it.

    For imports of large libraries: cut short, they abort the process from C++, or take what is
    half imported for a missing part and go on without it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or minded by somebody
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


class StopSignals:
    """A context in which SIGTERM, SIGUSR1 and the first SIGINT only set a flag.

    `announce`: answer Ctrl-C with a line at once, as a step may take long. What the caller ignores
    (SIGINT, for a job that a script started in the background) stays ignored.
    """

    def __init__(self, *, announce: bool = False) -> None:
        self.terminate = False
        self.ctrl_c = False
        self._announce = announce
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if self.terminate and number != signal.SIGINT:
                # The process saved, and is about to say so with its exit code: a second SIGTERM must not cut that off.
                handler = signal.SIG_IGN
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.ctrl_c = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._announce:  # not print: this may have come in the middle of one
                os.write(
                    2, b"\nCtrl-C: saving what was learned, then ending; press it again to end without\n"
                )
        else:
            self.terminate = True

    def is_asked(self) -> bool:
        """Has this process been asked to stop, in either way?"""
        return self.terminate or self.ctrl_c

    def flags(self) -> tuple[float, float]:
        """(asked to terminate, Ctrl-C), to be summed over ranks."""
        return float(self.terminate), float(self.ctrl_c)


def exit_code_for(terminate: float, ctrl_c: float) -> int | None:
    """The exit code that all ranks' summed flags ask for; None to go on."""
    if ctrl_c:
        return EXIT_CTRL_C
    return EXIT_INTERRUPTED if terminate else None
