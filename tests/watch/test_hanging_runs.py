"""Ranks of a real run that hang, each in its own way: the run ends in time, and it is known who, where and why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from launching import clean_environment, free_port
from watched_runs import BOUND_SECONDS, STEP_SECONDS, launch_local

from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed
from pretrain.cli import main

TRAIN = [sys.executable, "-m", "pretrain.cli", "train", "RECIPE"]
HERE = os.uname().nodename


def once_only(command: list[str]) -> list[str]:
    """`command`, a launch, without restarts."""
    described = subprocess.run(
        [*command[:5], "--help"], capture_output=True, text=True, env=clean_environment()
    )
    return [*command, "--max-restarts", "0"] if "--max-restarts" in described.stdout else command


def end_in_time(run, rank: int, *, since: float) -> int:
    """The exit code of a run in which trouble began at `since`: that rank is gone within the bound, all soon after."""
    pids = run.ranks()
    while psutil.pid_exists(pids[rank]):
        late = time.monotonic() - since - STEP_SECONDS - BOUND_SECONDS
        assert late < 0, f"rank {rank} is still there:\n{run.said()}"
        time.sleep(0.05)
    code = run.end()
    for checkpoint in committed(run.run_dir):
        assert load_weights(checkpoint)
    return code


def test_a_run_on_one_device_that_hangs_is_ended_too(launch):
    run = launch(TRAIN, inject=[{"what": "hang", "step": 4}], overrides=["watchdog.step_seconds=3"])
    assert run.end() == -signal.SIGKILL
    record = run.record(0)
    assert (record["kind"], record["phase"], record["step"], record["at_fault"]) == (
        "stuck",
        "forward",
        4,
        [0],
    )
    assert f"rank 0 on host {HERE} is stuck, in phase forward after step 4" in run.exit_record(0)["reason"]
    assert "in hang" in run.stacks(0)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_and_is_named(launch):
    run = launch(once_only(launch_local(2)))
    run.wait_for(lambda: run.steps() >= 7, "step 7")
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert end_in_time(run, 1, since=time.monotonic()) == 1
    record = run.record(1)
    assert (record["rank"], record["host"], record["kind"]) == (1, HERE, "stopped")
    assert record["step"] in (run.steps(), run.steps() + 1)
    assert f"rank 1 on host {HERE} is stopped" in run.said()
    assert f"after step {record['step']}" in run.said()
    assert "state T" in run.stacks(1)
    assert "is stopped" in run.exit_record(1)["reason"]
    assert "gloo" in run.exit_record(0)["reason"] or "waits for its peers" in run.exit_record(0)["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind", "phase", "shown"),
    [
        ("hold", "held", "forward", "in hold"),
        ("hang", "stuck", "forward", "in hang"),
        ("hang_in_data", "stuck", "data", "in faulty_steps"),
    ],
)
def test_a_rank_that_hangs_by_itself_ends_the_run_and_its_peer_is_not_blamed(
    launch, what, kind, phase, shown
):
    run = launch(once_only(launch_local(2)), inject=[{"what": what, "rank": 1, "step": 8}])
    run.wait_for(lambda: run.steps() >= 8, "step 8")
    assert end_in_time(run, 1, since=time.monotonic()) == 1
    record = run.record(1)
    assert (record["rank"], record["kind"], record["phase"], record["step"]) == (1, kind, phase, 8)
    assert record["at_fault"] == [1]
    assert shown in run.stacks(1)
    assert f"rank 1 on host {HERE}" in run.exit_record(1)["reason"]
    peer = run.attempt / "watchdog-0.json"
    assert not peer.exists() or run.record(0)["kind"] == "waiting"


@pytest.mark.slow
def test_a_probe_that_takes_long_on_rank_0_is_no_hang_for_anybody_and_one_that_hangs_is_named(
    launch, tmp_path
):
    for words in (
        [
            "synth",
            str(tmp_path / "images"),
            "--samples",
            "32",
            "--image-size",
            "32",
            "--classes",
            "4",
            "--seed",
            "5",
        ],
        ["pack", str(tmp_path / "images"), str(tmp_path / "val")],
    ):
        assert main(["data", *words]) == 0
    seconds = 30  # that ranks may take to start, and stand still in a probe
    run = launch(
        once_only(launch_local(2)),
        inject=[
            {"what": "hang_in_probe", "rank": 0, "step": 8},
            {"what": "long_probe", "rank": 0, "seconds": seconds + 10},
        ],
        overrides=[
            f"watchdog.start_seconds={seconds}",
            f"eval.probes.val={tmp_path / 'val'}",
            "eval.probes.every_steps=4",
            "eval.probes.few_shot=[]",
        ],
    )
    assert run.end() == 1
    [probe] = run.events("probe")
    assert (probe["step"], probe["probe"]) == (4, "knn")
    assert probe["seconds"] > seconds + 9
    record = run.record(0)
    assert (record["kind"], record["phase"], record["step"]) == ("stuck", "validate", 8)
    assert record["at_fault"] == [0]
    assert "in faulty_knn" in run.stacks(0)
    assert f"rank 0 on host {HERE} is stuck, in phase validate after step 8" in run.said()
    peer = run.attempt / "watchdog-1.json"
    assert not peer.exists() or run.record(1)["kind"] == "waiting"


@pytest.mark.slow
def test_under_the_launcher_of_deepspeed_a_stopped_rank_ends_the_run_too(launch):
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port"]
    run = launch([*deepspeed, str(free_port()), "--module", "pretrain.train", "RECIPE"])
    run.wait_for(lambda: run.steps() >= 7, "step 7")
    os.kill(run.ranks()[0], signal.SIGSTOP)
    assert end_in_time(run, 0, since=time.monotonic()) != 0
    assert run.record(0)["kind"] == "stopped"
    assert f"rank 0 on host {HERE} is stopped" in run.said()
    if (run.attempt / "watchdog-1.json").exists():
        assert (run.record(1)["kind"], run.record(1)["at_fault"]) == ("waiting", [0])


@pytest.mark.slow
def test_the_next_attempt_tells_of_the_watchdog_that_ended_the_one_before(launch):
    run = launch(TRAIN, inject=[{"what": "hang", "step": 8}])
    run.wait_for(lambda: run.steps() >= 8, "step 8")
    since = time.monotonic()
    assert run.end() == -signal.SIGKILL
    assert time.monotonic() < since + STEP_SECONDS + BOUND_SECONDS
    port = free_port()
    again = launch(TRAIN, overrides=["metrics.port=" + str(port)])
    again.wait_for(lambda: again.steps() >= 12, "step 12")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    again.process.terminate()
    assert again.end() == 75
    [told] = again.events("watchdog")
    assert (told["of_attempt"], told["rank"], told["kind"], told["phase"]) == (1, 0, "stuck", "forward")
    assert f"attempt 1 was ended by a watchdog: rank 0 on host {HERE} is stuck" in again.said()
    assert "pretrain_watchdog_ended_ranks 1.0" in metrics
    assert "pretrain_idle_seconds " in metrics
