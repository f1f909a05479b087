"""One budget of retries a node: it bounds a storm, and no death or frozen neighbour empties or blocks it."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import struct
import time
from pathlib import Path

import pytest
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.errors import StorageError
from pretrain.storage import RetryPolicy, S3Settings, open_storage
from pretrain.storage.retry import Retries
from pretrain.storage.retry_budget import RetryBudget


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["a file", "this process"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "retries" if request.param == "a file" else None


def test_a_burst_is_free_and_then_retries_come_at_the_rate(path: Path | None) -> None:
    clock = Clock()
    budget = RetryBudget(path, burst=5, per_second=2, clock=clock)
    assert [budget.take() for _ in range(8)] == [0, 0, 0, 0, 0, 0.5, 1.0, 1.5]
    clock.now += 4.0
    assert [budget.take() for _ in range(6)] == [0, 0, 0, 0, 0, 0.5]


def test_what_is_given_back_can_be_taken_again_but_never_more_than_the_burst(path: Path | None) -> None:
    budget = RetryBudget(path, burst=2, per_second=0.001, clock=Clock())
    for _ in range(5):
        budget.give_back()
    assert [budget.take(), budget.take()] == [0, 0]
    budget.give_back()
    assert budget.take() == 0
    assert budget.take() > 0


def test_a_record_of_another_boot_or_of_no_sense_is_a_full_bucket(tmp_path: Path) -> None:
    clock = Clock()
    budget = RetryBudget(tmp_path / "retries", burst=1, per_second=1, clock=clock)
    assert [budget.take(), budget.take()] == [0, 1]
    clock.now = 3.0  # the system's clock begins again
    assert [budget.take(), budget.take()] == [0, 1]
    numbers = [
        (-1e291, 1.0),
        (-2e6, 2.0),
        (2.0, 1.0),
        (0.0, 4.0),
        (0.0, -1.0),
        (float("nan"), 1.0),
        (0.0, float("nan")),
    ]
    for junk in (b"", b"x", b"\xff" * 16, *(struct.pack("<dd", *pair) for pair in numbers)):
        (tmp_path / "retries").write_bytes(junk)
        assert [budget.take(), budget.take()] == [0, 1], junk


def test_a_folder_that_cannot_be_written_leaves_a_budget_of_ones_own() -> None:
    budget = RetryBudget(Path("/proc/retries"), burst=1, per_second=1, clock=Clock())
    assert [budget.take(), budget.take()] == [0, 1]


def test_a_retry_waits_as_long_as_the_budget_says_and_gives_up_in_its_own_time() -> None:
    clock = Clock()
    budget = RetryBudget(None, burst=1, per_second=0.1, clock=clock)
    policy = RetryPolicy(seconds=15.0, first_delay_seconds=0.01, longest_delay_seconds=0.01)
    retries = Retries(policy, budget=budget, sleep=clock.sleep, clock=clock)
    assert retries.try_again()
    assert clock.now == pytest.approx(1000.01)
    assert retries.try_again()
    assert clock.now == pytest.approx(1010.0, abs=0.1)
    assert not retries.try_again(), "the next place is beyond its patience"
    assert budget.take() == pytest.approx(10.0, abs=0.2), "and is not taken away from others"


def test_a_success_after_failures_frees_its_place() -> None:
    clock = Clock()
    budget = RetryBudget(None, burst=1, per_second=0.01, clock=clock)
    for _ in range(10):
        retries = Retries(RetryPolicy(), budget=budget, sleep=clock.sleep, clock=clock)
        assert retries.try_again()
        retries.succeeded()
    assert clock.now < 1010


def _take(path: Path, count: int) -> None:
    budget = RetryBudget(path, burst=100, per_second=1e-6)
    for _ in range(count):
        budget.take()


def test_processes_take_from_one_bucket_and_a_kill_leaves_it_whole(tmp_path: Path) -> None:
    path, context = tmp_path / "retries", multiprocessing.get_context("fork")
    takers = [context.Process(target=_take, args=(path, 10)) for _ in range(8)]
    for child in takers:
        child.start()
    for child in takers:
        child.join()
        assert child.exitcode == 0
    budget = RetryBudget(path, burst=100, per_second=1e-6)
    assert [budget.take() for _ in range(20)] == [0] * 20
    assert budget.take() > 0
    for _ in range(20):
        victim = context.Process(target=_take, args=(path, 10**9))
        victim.start()
        time.sleep(0.02)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert path.stat().st_size == 16
        assert budget.take() > 0, "a number, and no full bucket"


def test_a_frozen_holder_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "retries"
    budget = RetryBudget(path, burst=1, per_second=1)
    budget.take()
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        budget.take()
        assert time.monotonic() - started < 2


def _read_until_refused(url: str, settings: S3Settings) -> None:
    store = open_storage(url, s3=settings)
    try:
        store.read("a")
    except StorageError:
        os._exit(0)
    os._exit(1)


def test_eight_processes_together_do_not_storm_a_store_in_trouble(
    s3_bucket: str, s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = RetryPolicy(attempts=10_000, seconds=4.0, first_delay_seconds=0.001, longest_delay_seconds=0.01)
    settings = S3Settings(retry=eager, retry_burst=20, retries_per_second=10)
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.weather = lambda method: Fault(kind="503", method=method)
        children = [
            multiprocessing.get_context("spawn").Process(
                target=_read_until_refused, args=(s3_bucket, settings)
            )
            for _ in range(8)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 8
        # Eight first requests, the burst, and what comes back while the slowest starts and gives up.
        assert 8 + 20 < len(proxy.requests) <= 8 + 20 + 10 * 9, "alone, each would make hundreds"
