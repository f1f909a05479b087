"""A rank that is slow is named; noise, load and single slow steps are not ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from pretrain.metrics.compute_time import ComputeTime
from pretrain.metrics.journal import read_journal
from pretrain.metrics.reporter import Reporter
from pretrain.metrics.slow_ranks import SlowRanks


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """Steps of `seconds_a_step` that take ranks as long as they are told to."""

    def __init__(self, *, window_steps: int = 50, seconds: float = 60.0, ratio: float = 1.25) -> None:
        self.clock = Clock()
        self.ranks = SlowRanks(ratio=ratio, window_steps=window_steps, seconds=seconds, clock=self.clock)
        self.found: list[tuple[float, int, bool]] = []

    def step(self, seconds: list[float], seconds_a_step: float = 1.0):
        self.clock.now += seconds_a_step
        for finding in self.ranks.add(seconds):
            self.found.append((self.clock.now, finding.rank, finding.is_slow))


def noise(seed: int, ranks: int) -> np.ndarray:
    """Log-normal, with one step in ten of one rank three times as long: what a busy machine does."""
    random = np.random.default_rng(seed)
    times = 0.2 * random.lognormal(0.0, 0.25, ranks)
    if random.random() < 0.1 * ranks:
        times[random.integers(ranks)] *= 3
    return times


@pytest.mark.parametrize("ranks", [2, 3, 8, 512])
def test_a_rank_that_takes_200_ms_more_is_found_among_noise_and_no_other(ranks):
    run = Run()
    slow = ranks - 1
    for step in range(300):
        times = noise(step, ranks)
        times[slow] += 0.2
        run.step(times.tolist())
    [(at, rank, is_slow)] = run.found
    assert (rank, is_slow) == (slow, True)
    assert 60.0 <= at <= 150.0
    assert run.ranks.slow == {slow}
    assert run.ranks.medians[slow] == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_noise_makes_no_rank_slow(ranks):
    run = Run()
    for step in range(2000):
        run.step(noise(step, ranks).tolist())
    assert run.found == []


def test_a_processor_that_is_shared_for_half_a_minute_makes_no_rank_slow():
    run = Run()
    for step in range(1000):
        times = noise(step, 4)
        times[(step // 300) % 4] *= 2  # another neighbour moves in after 30 s of steps of 0.1 s
        run.step(times.tolist(), seconds_a_step=0.1)
    assert run.found == []


def test_a_rank_that_recovers_is_said_to_and_a_host_of_slow_ranks_is_found_as_a_whole():
    run = Run()
    for step in range(400):
        times = noise(step, 16)
        if step < 200:
            times[8:12] += 0.3
        run.step(times.tolist())
    assert {rank for _, rank, is_slow in run.found if is_slow} == {8, 9, 10, 11}
    assert {rank for at, rank, is_slow in run.found if not is_slow and at > 200} == {8, 9, 10, 11}
    assert run.ranks.slow == set()


def test_differences_of_less_than_ten_milliseconds_are_nothing():
    run = Run()
    for _ in range(300):
        run.step([0.002, 0.009])
    assert run.found == []


def test_a_clock_that_jumps_forward_shows_at_most_what_was_there():
    run = Run()
    for step in range(200):
        run.step(noise(step, 4).tolist())
        run.clock.now += 3600.0
    assert run.found == []


def test_a_slow_rank_and_its_recovery_are_told_once_each(tmp_path, capsys):
    reporter = Reporter.for_main(
        tmp_path,
        attempt=1,
        total_steps=100,
        server=None,
        log_every_steps=1,
        slow_ranks=SlowRanks(ratio=1.25, window_steps=10, seconds=0.0),
        hosts=["a", "b", "b"],
    )
    for step in range(1, 60):
        compute = [0.2, 0.2, 0.4 if step < 30 else 0.2]
        reporter.times_of_ranks({"compute": compute}, step=step, samples=16 * step)
    reporter.close()
    told = [
        line for line in read_journal(tmp_path / "journal.jsonl") if line["event"].startswith("slow_rank")
    ]
    assert [line["event"] for line in told] == ["slow_rank", "slow_rank_over"]
    assert {(line["rank"], line["host"]) for line in told} == {(2, "b")}
    assert (told[0]["step"], told[0]["seconds"], told[0]["others_seconds"]) == (10, 0.4, 0.2)
    said = capsys.readouterr().err
    assert "step 10: rank 2 on host b is slow: it computes for 0.400 s" in said
    assert "rank 2 on host b is slow no more" in said


def test_compute_time_is_that_of_the_first_micro_batch():
    compute = ComputeTime(torch.device("cpu"))
    for number, seconds in enumerate([0.05, 0.15, 0.15]):
        with compute.measured("forward", first=number == 0):
            time.sleep(seconds)
    assert 0.05 <= compute.seconds < 0.15
