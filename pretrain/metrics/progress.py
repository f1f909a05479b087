"""What a person at the terminal sees of a run. Used by train.py on rank 0.

On a terminal one line is redrawn in place; anywhere else (a file, `kubectl logs`) a plain line
comes every few seconds, so that logs stay short and readable.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

_ERASE_LINE = "\r\x1b[K"
_REDRAW_SECONDS = 0.1
_ETA_WINDOW = 200  # steps: long enough to hold a checkpoint or two, short enough to follow a change of speed


class Progress:
    """A progress line with the time that is left, to `stream` (standard error by default)."""

    def __init__(
        self,
        *,
        total_steps: int,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._every_seconds = _REDRAW_SECONDS if self._is_terminal else every_seconds
        self._clock = clock
        self._drawn_at: float | None = None
        self._line_is_open = False
        self._history: deque[tuple[float, int]] = deque(maxlen=_ETA_WINDOW)

    def update(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        images_per_second: float,
        data_wait_fraction: float,
    ) -> None:
        """After step `step` (1-based, so `total_steps` is the last). `data_wait_fraction` is 0 to 1."""
        now = self._clock()
        self._history.append((now, step))
        is_last = step >= self._total_steps
        if self._drawn_at is not None and now - self._drawn_at < self._every_seconds and not is_last:
            return
        self._drawn_at = now
        width = len(str(self._total_steps))
        parts = [
            f"step {step:>{width}}/{self._total_steps}",
            f"loss {loss:.4f}",
            f"lr {learning_rate:.2e}",
            f"{images_per_second:,.0f} images/s"
            if images_per_second >= 10
            else f"{images_per_second:.2f} images/s",
            f"data wait {data_wait_fraction:.0%}",
            f"ETA {format_duration(self._seconds_left(step))}",
        ]
        self._draw("  ".join(parts))

    def note(self, text: str) -> None:
        """A line of its own that stays (a checkpoint written, a validation result)."""
        erase = _ERASE_LINE if self._line_is_open else ""
        self._line_is_open = False
        self._drawn_at = None if self._is_terminal else self._drawn_at  # on a terminal, draw again at once
        self._write(f"{erase}{text}\n")

    def close(self) -> None:
        """Leave the last line standing and the cursor below it."""
        if self._line_is_open:
            self._write("\n")
            self._line_is_open = False

    def _draw(self, line: str) -> None:
        if not self._is_terminal:
            self._write(line + "\n")
            return
        # A line as wide as the terminal would wrap, and could then not be drawn over.
        columns = shutil.get_terminal_size().columns
        self._write(_ERASE_LINE + line[: max(1, columns - 1)])
        self._line_is_open = True

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _seconds_left(self, step: int) -> float | None:
        (first_time, first_step), (last_time, last_step) = self._history[0], self._history[-1]
        if step >= self._total_steps:
            return 0.0
        if last_step <= first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self._total_steps - step)


def format_duration(seconds: float | None) -> str:
    """`1d03h`, `2h05m`, `3m20s`, `12s`; `?` for None."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    if minutes:
        return f"{minutes}m{rest:02}s"
    return f"{rest}s"
