"""How long a rank computes before it waits for others, as slow_ranks.py compares it. Used by train.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ComputeTime:
    """A stop watch for what this rank computes by itself in a step: the first micro-batch's forward.

    Nothing in it waits for other ranks (at ZeRO stage 3 the gathering of weights does). On a GPU it is the
    device's own time between two events, read one step later, when the host does not have to wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.seconds = 0.0  # of the newest step that is known

    @contextmanager
    def measured(self, *, first: bool) -> Iterator[None]:
        """Around a micro-batch's forward; only a step's first one counts."""
        if not first:
            yield
        elif self._on_gpu:
            if self._events is not None:  # of the step before, whose sums were read since
                self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events = began, ended
        else:
            at = time.perf_counter()
            yield
            self.seconds = time.perf_counter() - at
