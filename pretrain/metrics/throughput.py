"""Where a step's seconds go, and how many images a second come of them. Used by train.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One step, in seconds of wall time."""

    step_seconds: float  # the whole step, waiting for data included
    data_seconds: float  # of these, waiting for the loader
    images: int  # of all ranks

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds if self.step_seconds > 0 else 0.0


class Throughput:
    """A stop watch for steps. `start()`, then `data_arrived()`, then `finish(images)`, each step.

    What happens between `finish` and the next `start` (a checkpoint, a validation) is not part of any
    step. The smoothed figures are sums over the last `window_steps` steps, not means of ratios.
    """

    def __init__(self, *, window_steps: int = 50, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._window: deque[StepTimes] = deque(maxlen=window_steps)
        self._started: float | None = None
        self._data_arrived: float | None = None

    def start(self) -> None:
        self._started = self._clock()
        self._data_arrived = None

    def data_arrived(self) -> None:
        assert self._started is not None, "data_arrived() comes after start()"
        self._data_arrived = self._clock()

    @property
    def data_seconds(self) -> float:
        """That the step under way waited for data; 0 before they have arrived."""
        if self._started is None or self._data_arrived is None:
            return 0.0
        return self._data_arrived - self._started

    def finish(self, images: int) -> StepTimes:
        """End the step that trained on `images` images, counted over all ranks."""
        assert self._started is not None, "finish() comes after start()"
        times = StepTimes(
            step_seconds=self._clock() - self._started, data_seconds=self.data_seconds, images=images
        )
        self._window.append(times)
        self._started = None
        return times

    @property
    def images_per_second(self) -> float:
        """Smoothed over the window; 0 before the first step."""
        seconds = self._seconds()
        return sum(times.images for times in self._window) / seconds if seconds else 0.0

    @property
    def data_wait_fraction(self) -> float:
        """The share of the window's time that was spent waiting for data, 0 to 1."""
        seconds = self._seconds()
        return sum(times.data_seconds for times in self._window) / seconds if seconds else 0.0

    def _seconds(self) -> float:
        return sum(times.step_seconds for times in self._window)
