"""The mean of a few repeated measurements, and how far the true one may be from it. Called by the demo, `pretrain
transfer` and the benchmark of objectives; pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t at 97.5 %, for 1 to 30 degrees of freedom: NIST/SEMATECH e-Handbook, section 1.3.6.7.2, with a decimal
# more.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
MOST_VALUES = len(T_975) + 1


@dataclass(frozen=True, kw_only=True)
class Interval:
    """mean ± half_width holds the true mean with 95 % where values are normally distributed."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def is_above(self, other: Interval) -> bool:
        """Above it, and the two do not overlap."""
        return self.low > other.high


def t_interval(values: Sequence[float]) -> Interval:
    """Student's interval of 2 to 31 values. Raises ValueError for fewer or more."""
    if not 2 <= len(values) <= MOST_VALUES:
        raise ValueError(f"an interval is of 2 to {MOST_VALUES} values: got {len(values)}")
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=statistics.fmean(values), half_width=T_975[len(values) - 2] * spread)


def percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} ± {100 * interval.half_width:.1f} %"
