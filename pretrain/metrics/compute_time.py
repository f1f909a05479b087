"""How long a rank computes in a step, by phase. Used by steps.py and train.py; slow_ranks.py compares a part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

PHASES = ("forward", "backward", "optimizer")


class ComputeTime:
    """A stop watch for the phases of a step, summed over its micro-batches.

    split: seconds by phase, of the newest step that is known. seconds: of it, what this rank computes by itself, the
    first micro-batch's forward: nothing in it waits for other ranks (at ZeRO stage 3 the gathering of weights does).
    On a GPU both are the device's own time between events, and known one step later, when nobody has to wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, bool, torch.cuda.Event, torch.cuda.Event]] = []
        self.split: Mapping[str, float] = dict.fromkeys(PHASES, 0.0)
        self.seconds = 0.0

    def begin(self) -> None:
        """A step begins, and the host has read numbers of the one before from the device."""
        split = dict.fromkeys(PHASES, 0.0)
        for phase, first, began, ended in self._events:
            seconds = began.elapsed_time(ended) / 1e3
            split[phase] += seconds
            self.seconds = seconds if first else self.seconds
        self._events = []
        self.split = split

    @contextmanager
    def measured(self, phase: str, *, first: bool = False) -> Iterator[None]:
        """Around a part of a step that belongs to `phase`. first: the first micro-batch's forward."""
        if self._on_gpu:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._events.append((phase, first, began, ended))
            return
        at = time.perf_counter()
        yield
        seconds = time.perf_counter() - at
        self.split = {**self.split, phase: self.split[phase] + seconds}
        self.seconds = seconds if first else self.seconds
