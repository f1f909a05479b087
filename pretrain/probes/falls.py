"""Is a run's network getting worse? Judged from its probes so far, on rank 0. Called by evaluations.py.

Two rules. A probe *falls below its best* when it stays below the best value so far by more than the margin twice in
a row: a best of many is a lucky one, and one low value after it says little. It falls *below its start* when the
run continues another network and a value is below that of step 0 by more than the margin.

The margin is two binomial standard errors of the difference of two independent measurements,
2 √(p(1-p)/n + q(1-q)/n), n being the number of validation images, p taken as (right + 1)/(n + 2). Both values are of
the same images, which correlates them, so that the margin errs on the side of silence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

TIMES_IN_A_ROW = 2
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One value of a probe; samples: validation images."""

    step: int
    top1: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Fall:
    """`top1` is below `reference`, the best so far or the start, by more than `margin`."""

    probe: str
    below: Literal["best", "start"]
    top1: float
    reference: float
    reference_step: int
    margin: float

    def __str__(self) -> str:
        where = "its best" if self.below == "best" else "where the run began"
        again = " again" if self.below == "best" else ""
        return (
            f"the features get worse: the {self.probe} probe is at {100 * self.top1:.2f} %,{again} more than "
            f"{100 * self.margin:.2f} points below {where} ({100 * self.reference:.2f} % at step {self.reference_step})"
        )


def margin(first: Measured, second: Measured) -> float:
    """How far two values of one network may lie apart by chance."""
    variance = 0.0
    for one in (first, second):
        p = (one.top1 * one.samples + 1) / (one.samples + 2)
        variance += p * (1 - p) / one.samples
    return STANDARD_ERRORS * math.sqrt(variance)


class FallWatch:
    """The values of each probe so far. continues: does the run continue another network (init_from)?"""

    def __init__(self, *, continues: bool) -> None:
        self._continues = continues
        self._history: dict[str, list[Measured]] = {}

    @property
    def falling(self) -> dict[str, bool]:
        """Of each probe measured so far: is its newest value one that tells of a fall?"""
        return {probe: bool(_falls(probe, past, self._continues)) for probe, past in self._history.items()}

    def add(self, probe: str, value: Measured) -> list[Fall]:
        """One more value: the falls that are new with it. A fall that lasts is told once."""
        past = [one for one in self._history.get(probe, []) if one.step < value.step]
        before = {fall.below for fall in _falls(probe, past, self._continues)}
        self._history[probe] = [*past, value]
        found = _falls(probe, self._history[probe], self._continues)
        return [fall for fall in found if fall.below not in before]

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: what was measured later is of weights that it gave up."""
        for probe, past in self._history.items():
            self._history[probe] = [one for one in past if one.step <= step]

    def read(self, records: Iterable[Mapping[str, Any]], *, same: Mapping[str, Any], up_to_step: int) -> None:
        """Take up what the journal tells of the run so far: its `probe`, `start` and `rollback` events.

        same: fields that a probe's line must have, so that values of other data are not compared with.
        """
        for record in records:
            if record.get("event") in ("start", "rollback"):
                self.go_back(int(record["step"]))
            elif record.get("by") == "train" and all(record.get(name) == what for name, what in same.items()):
                value = Measured(
                    step=int(record["step"]), top1=float(record["top1"]), samples=int(record["val_samples"])
                )
                self.add(str(record["probe"]), value)
        self.go_back(up_to_step)


def _falls(probe: str, past: list[Measured], continues: bool) -> list[Fall]:
    """The falls that stand at the last of `past`."""
    if len(past) < 2:
        return []
    found = []
    best, low = past[0], 0
    for value in past[1:]:
        low = low + 1 if value.top1 < best.top1 - margin(best, value) else 0
        best = value if value.top1 > best.top1 else best
    last, first = past[-1], past[0]
    if low >= TIMES_IN_A_ROW:
        found.append(_fall(probe, "best", last, best))
    if continues and first.step == 0 and last.top1 < first.top1 - margin(first, last):
        found.append(_fall(probe, "start", last, first))
    return found


def _fall(probe: str, below: Literal["best", "start"], value: Measured, reference: Measured) -> Fall:
    return Fall(
        probe=probe,
        below=below,
        top1=value.top1,
        reference=reference.top1,
        reference_step=reference.step,
        margin=margin(reference, value),
    )
