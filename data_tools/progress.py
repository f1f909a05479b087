"""Progress of long work: a bar on a terminal, else a plain line now and then. Called by the data tools."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts `unit`s up to `total` on standard error. A context manager."""

    def __init__(self, *, total: int, what: str, unit: str) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done = 0
        self._started = self._printed = time.monotonic()
        scale = unit == "B"
        self._bar = (
            tqdm(total=total, desc=what, unit=f" {unit}" if not scale else "B", unit_scale=scale)
            if sys.stderr.isatty()
            else None
        )

    def add(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            print(
                f"{self._what}: {self._done} of {self._total} {self._unit}, "
                f"{rate:.0f} a second, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
