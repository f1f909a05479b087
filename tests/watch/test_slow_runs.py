"""Runs that are slow, busy, or have a wall clock that jumps: what is said of them, and what is not."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request

import pytest
from launching import free_port
from watched_runs import launch_local

from pretrain.metrics.journal import read_journal, steps_of

SHORT = ["watchdog.slow_rank_steps=20", "watchdog.slow_rank_seconds=4"]
# Busy for a while, idle for a while, by chance.
RESTLESS = """
import random, time
while True:
    until = time.monotonic() + random.random()
    while time.monotonic() < until:
        pass
    time.sleep(random.random())
"""


@pytest.mark.slow
def test_a_rank_that_is_200_ms_slower_a_step_is_named(launch):
    port = free_port()
    run = launch(
        launch_local(2),
        inject=[{"what": "slow", "rank": 1, "seconds": 0.2}],
        overrides=[*SHORT, f"metrics.port={port}"],
    )
    run.wait_for(lambda: run.steps() > 0 and run.events("slow_rank"), "the event")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    run.process.terminate()
    assert run.end() == 75
    [event] = run.events("slow_rank")
    assert event["rank"] == 1
    assert event["seconds"] > 0.2
    assert event["seconds"] - event["others_seconds"] > 0.15
    assert f"rank 1 on host {event['host']} is slow" in run.said()
    assert "pretrain_slowest_rank 1.0" in metrics
    assert "pretrain_slow_ranks 1.0" in metrics
    assert 'pretrain_rank_compute_seconds{host="' in metrics


@pytest.mark.slow
def test_ranks_on_a_restless_machine_are_not_called_slow(launch):
    # The time that a rank must have been slow is shorter than the default, or this would show nothing.
    overrides = ["watchdog.slow_rank_steps=20", "watchdog.slow_rank_seconds=10"]
    restless = [subprocess.Popen([sys.executable, "-S", "-c", RESTLESS]) for _ in range(2)]
    try:
        run = launch(launch_local(2), inject=[{"what": "load", "seconds": 0.2}], overrides=overrides)
        run.wait_for(lambda: run.steps() > 0, "the first step")
        began = time.monotonic()
        run.wait_for(
            lambda: time.monotonic() > began + 30 and run.steps() > 60, "sixty steps in half a minute"
        )
        run.process.terminate()
        assert run.end() == 75
    finally:
        for process in restless:
            process.kill()
            process.wait()
    assert run.events("slow_rank") == []


@pytest.mark.slow
def test_a_wall_clock_that_jumps_by_an_hour_changes_nothing(launch):
    def losses(run) -> dict[int, float]:
        steps = steps_of(read_journal(run.run_dir / "journal.jsonl"))
        return {step: record["loss"] for step, record in steps.items()}

    overrides = [*SHORT, "train.steps=40", "data.workers=1"]
    reference = launch(launch_local(2), overrides=overrides, name="reference")
    assert reference.end() == 0
    jumping = launch(launch_local(2), overrides=overrides, inject=[{"what": "clock"}])
    assert jumping.end() == 0
    assert losses(jumping) == losses(reference)
    times = [line["time"] for line in jumping.events("step")]
    assert max(times) - min(times) > 7000  # it did jump
    assert not jumping.events("slow_rank")
    assert not list(jumping.attempt.glob("watchdog-*"))
