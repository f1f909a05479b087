"""The mean of a few runs and how far it may be off. Pure; used by the demo and by transfer.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, 97.5 % quantile by degrees of freedom from 1 on: NIST/SEMATECH e-Handbook, section 1.3.6.7.2.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)
MOST_VALUES = len(T_975) + 1


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % confidence interval, mean ± half_width."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of 2 to MOST_VALUES values and its 95 % interval by Student's t."""
    count = len(values)
    assert 2 <= count <= MOST_VALUES, f"an interval is for 2 to {MOST_VALUES} values, got {count}"
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean=mean, half_width=T_975[count - 2] * deviation / math.sqrt(count))


def percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ± {100 * interval.half_width:.1f} %"
