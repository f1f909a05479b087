"""An exponential moving average of the weights. Held by both engines, beside the float32 masters."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ema_decay_at(updates: int, *, decay: float, warmup: bool) -> float:
    """The decay of the average's update after the `updates`-th optimizer step (the first is 1).

    warmup: min(decay, (1 + t) / (10 + t)), so that the first, random weights are soon forgotten (TensorFlow's
    ExponentialMovingAverage with `num_updates`).
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


class WeightAverage:
    """One float32 tensor for each master, in the same layout: whatever part of the weights a rank owns, it averages.

    Elementwise, so that it does not matter how parameters are cut, and no rank needs another's.
    """

    def __init__(self, masters: Sequence[torch.Tensor], *, decay: float, warmup: bool) -> None:
        self._masters = [master.detach() for master in masters]
        self._averages = [master.clone() for master in self._masters]
        self._of = {id(master): average for master, average in zip(masters, self._averages, strict=True)}
        self._decay, self._warmup = decay, warmup

    def of(self, master: torch.Tensor) -> torch.Tensor:
        """The average of that master, live."""
        return self._of[id(master)]

    def restart(self) -> None:
        """Begin again from the weights as they are."""
        torch._foreach_copy_(self._averages, self._masters)

    def update(self, updates: int) -> None:
        """Take in the weights after the `updates`-th optimizer step."""
        decay = ema_decay_at(updates, decay=self._decay, warmup=self._warmup)
        torch._foreach_lerp_(self._averages, self._masters, 1 - decay)

    def swap(self) -> None:
        """Put the averages where the weights are and the weights where the averages are. Twice: nothing."""
        for master, average in zip(self._masters, self._averages, strict=True):
            kept = master.clone()
            master.copy_(average)
            average.copy_(kept)
