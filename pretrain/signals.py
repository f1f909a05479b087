"""Told to stop: remember it until the step is done. Called by train.py's loop.

SIGTERM (a preemption) and the first Ctrl-C let the step finish and the run save; a second Ctrl-C
aborts at once. Signals reach ranks at different moments: the loop agrees on a step by summing.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from pretrain.errors import EXIT_CTRL_C, EXIT_INTERRUPTED


class StopSignals:
    """A context in which SIGTERM, SIGUSR1 and the first SIGINT only set a flag."""

    def __init__(self) -> None:
        self.terminate = False
        self.ctrl_c = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.ctrl_c = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
        else:
            self.terminate = True

    def flags(self) -> tuple[float, float]:
        """(asked to terminate, Ctrl-C), to be summed over ranks."""
        return float(self.terminate), float(self.ctrl_c)


def exit_code_for(terminate: float, ctrl_c: float) -> int | None:
    """The exit code that all ranks' summed flags ask for; None to go on."""
    if ctrl_c:
        return EXIT_CTRL_C
    return EXIT_INTERRUPTED if terminate else None
