"""Seconds and images are counted where they belong."""

import pytest

from pretrain.metrics.throughput import Throughput


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run_step(meter, clock, *, data, compute, images):
    meter.start()
    clock.now += data
    meter.data_arrived()
    clock.now += compute
    return meter.finish(images)


def test_a_step_is_split_into_waiting_for_data_and_the_rest():
    clock = Clock()
    meter = Throughput(clock=clock)
    times = run_step(meter, clock, data=0.5, compute=1.5, images=64)
    assert (times.step_seconds, times.data_seconds, times.images) == (2.0, 0.5, 64)
    assert times.images_per_second == 32.0


def test_a_checkpoint_between_two_steps_slows_neither():
    clock = Clock()
    meter = Throughput(clock=clock)
    run_step(meter, clock, data=0.0, compute=1.0, images=10)
    clock.now += 1000.0
    assert run_step(meter, clock, data=0.0, compute=1.0, images=10).images_per_second == 10.0
    assert meter.images_per_second == 10.0


def test_the_smoothed_rate_is_images_over_time_and_forgets_old_steps():
    clock = Clock()
    meter = Throughput(window_steps=2, clock=clock)
    run_step(meter, clock, data=50.0, compute=50.0, images=1)  # the slow first step leaves the window
    run_step(meter, clock, data=1.0, compute=0.0, images=10)
    run_step(meter, clock, data=0.0, compute=3.0, images=30)
    assert meter.images_per_second == pytest.approx(10.0)
    assert meter.data_wait_fraction == pytest.approx(0.25)
    run_step(meter, clock, data=0.0, compute=1.0, images=50)
    assert meter.images_per_second == pytest.approx(80 / 4)  # the mean of rates would be 30


def test_before_the_first_step_there_is_no_rate_and_no_error():
    meter = Throughput()
    assert meter.images_per_second == 0.0
    assert meter.data_wait_fraction == 0.0
