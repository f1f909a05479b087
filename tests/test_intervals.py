"""Student's interval against its definition: the t density, integrated here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pretrain.intervals import MOST_VALUES, T_975, Interval, t_interval


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


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        # Student's own sleep data (Biometrika 1908), drug 1: R's t.test gives -0.5297804 to 2.0297804
        ((0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0), 0.75, 1.2797804),
        ((1.0, 2.0, 3.0), 2.0, 2.4841377),  # 4.3026527 / sqrt(3)
        ((0.5, 0.5, 0.5), 0.5, 0.0),
        ((0.0, 1.0), 0.5, 6.3531024),  # 12.7062047 * sqrt(1/2) / sqrt(2)
    ],
)
def test_the_interval_is_students(values: tuple[float, ...], mean: float, half_width: float) -> None:
    interval = t_interval(values)
    assert interval.mean == pytest.approx(mean, abs=1e-12)
    assert interval.half_width == pytest.approx(half_width, rel=2.5e-5)  # the table has four decimals
    assert (interval.low, interval.high) == (mean - interval.half_width, mean + interval.half_width)


def test_intervals_that_touch_are_not_apart() -> None:
    low, high = Interval(mean=1.0, half_width=0.5), Interval(mean=2.0, half_width=0.5)
    assert not high.is_above(low)
    assert Interval(mean=2.001, half_width=0.5).is_above(low)
    assert not low.is_above(high)


@pytest.mark.parametrize("count", [0, 1, MOST_VALUES + 1])
def test_as_many_values_as_the_table_has_are_needed(count: int) -> None:
    with pytest.raises(ValueError, match=f"got {count}"):
        t_interval([0.5] * count)
