"""Student's interval against its definition: the t density, integrated here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.benchmarks.intervals import MOST_VALUES, T_975, Interval, t_interval


def mass_within(t: float, degrees: int) -> float:
    """Of Student's density between -t and t, by Simpson's rule."""
    x = np.linspace(0.0, t, 20_001)
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float(2 * (weights * density).sum() * (x[1] - x[0]) / 3)


def test_95_per_cent_of_students_density_lie_within_the_table() -> None:
    for degrees, t in enumerate(T_975, start=1):
        assert mass_within(t, degrees) == pytest.approx(0.95, abs=5e-6), degrees


def test_an_interval_of_three_values_is_the_one_worked_out_by_hand() -> None:
    found = t_interval([0.10, 0.12, 0.14])  # deviation 0.02, over the root of 3, times 4.3027
    assert found.mean == pytest.approx(0.12)
    assert found.half_width == pytest.approx(0.049683, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.070317, 0.169683), abs=1e-6)


def test_intervals_that_touch_are_not_apart() -> None:
    low, high = Interval(mean=1.0, half_width=0.5), Interval(mean=2.0, half_width=0.5)
    assert not high.is_above(low)
    assert Interval(mean=2.001, half_width=0.5).is_above(low)
    assert not low.is_above(high)


@pytest.mark.parametrize("count", [0, 1, MOST_VALUES + 1])
def test_as_many_values_as_the_table_has_are_needed(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count}"):
        t_interval([0.5] * count)
