"""Three hosts that train from a bucket in their own network: one is cut off, and comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from bucket_hosts import BUCKET, bucket_in
from launched_hosts import Launched, no_process_left, steps_of_attempt, until
from launching import ROOT, clean_environment
from services.ssh_hosts import Hosts
from small_run import RECIPE, pretrain

from launch.plan import checkpoint_bytes
from pretrain.checkpoint.attempts import read_attempts
from pretrain.checkpoint.manifest import committed
from pretrain.config.load import load_config
from pretrain.cost import cost_of
from pretrain.metrics.journal import read_journal

SILENCE_SECONDS = 20
# Ranks that lost a peer end by themselves within 15 s, or are ended within 10 s more; the rest is for a busy machine.
END_SECONDS = 50


def processes(hosts: Hosts, name: str, what: str, mark: bytes) -> list[int]:
    """The host's processes with `mark` in their /proc/PID/`what`; some end while we look."""
    found = []
    for pid in hosts.pids(name):
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/{what}").read_bytes():
                found.append(pid)
    return found


def losses_of_attempt(run_dir: Path, attempt: int) -> dict[int, float]:
    records = read_journal(run_dir / "journal.jsonl")
    return {r["step"]: r["loss"] for r in records if r["event"] == "step" and r["attempt"] == attempt}


def on_one_device(run_dir: Path, step: int, shards: Path, folder: Path, *, steps: int) -> Mapping[int, float]:
    """The losses of `steps` steps after the checkpoint at `step`, in a process of its own that nobody disturbs."""
    fork, log = folder / "reference", folder / "reference.log"
    done = pretrain("fork", f"{run_dir}@{step}", str(fork), f"data.train={shards}")
    assert done.returncode == 0, done.stderr
    with log.open("w") as output:
        train = subprocess.Popen(
            [sys.executable, "-m", "pretrain.cli", "train", str(fork / "config.yaml")],
            env=clean_environment(),
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )
    try:
        until(lambda: len(steps_of_attempt(fork, 1)) >= steps, "steps of the reference", [log], alive=train)
        train.terminate()
        assert train.wait(60) == 75, log.read_text()
    finally:
        train.kill()
        train.wait()
    return losses_of_attempt(fork, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_host_that_is_cut_off_is_done_without_and_taken_in_again_on_the_same_samples(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    run_dir, log, recipe = tmp_path / "run", tmp_path / "log", tmp_path / "recipe.yaml"
    sections = {
        **RECIPE,
        "run_dir": str(run_dir),
        "data": {
            **RECIPE["data"],
            "train": f"s3://{BUCKET}/shards",
            "workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        },
        "train": {**RECIPE["train"], "steps": 1_000_000},
        "checkpoint": {"every_steps": 10, "keep_last": 50},
    }
    recipe.write_text(yaml.safe_dump(sections))
    options = ["--least-nodes", "2", "--rendezvous-seconds", "90", "--silence-seconds", f"{SILENCE_SECONDS}"]
    with bucket_in(hosts, tmp_path / "ceph") as variables:
        sync = [sys.executable, "-m", "pretrain.cli", "data", "sync", str(shards), f"s3://{BUCKET}/shards"]
        subprocess.run(hosts.outside(sync), env=clean_environment(**variables), cwd=ROOT, check=True)
        run = Launched(hosts, recipe, log, *options, slots=(2, 1, 1), **variables)
        try:
            until(
                lambda: committed(run_dir) and max(steps_of_attempt(run_dir, 1)) % 10 in (4, 5, 6),
                "steps beyond a checkpoint",
                [log],
                alive=run.process,
                seconds=300,
            )
            hosts.cut("h2")
            until(
                lambda: read_attempts(run_dir),
                "the end of the first attempt",
                [log],
                alive=run.process,
                seconds=SILENCE_SECONDS + END_SECONDS,
            )
            [line] = read_attempts(run_dir)
            assert "h2 was lost" in line["reason"]
            until(
                lambda: max(steps_of_attempt(run_dir, 2), default=0) > line["last_step"],
                "steps of the second attempt, beyond the first's",
                [log],
                alive=run.process,
                seconds=300,
            )
            before, again = losses_of_attempt(run_dir, 1), losses_of_attempt(run_dir, 2)
            repeated = sorted(before.keys() & again.keys())
            assert repeated[:1] == [line["checkpoint_step"] + 1]
            for step in repeated[:10]:  # 4 ranks and 3, on the same samples
                assert again[step] == pytest.approx(before[step], rel=1e-5)

            # The way to take it back without a step lost: it is there, and one rank is told to stop.
            hosts.mend("h2")
            until(
                lambda: "h2 is there again" in log.read_text(),
                "h2 to be called again",
                [log],
                alive=run.process,
                seconds=300,
            )
            assert len(read_attempts(run_dir)) == 1, "that alone disturbs nobody"
            ranks = processes(hosts, "h1", "environ", b"RANK=2\0")
            os.kill(min(ranks), signal.SIGTERM)
            until(
                lambda: len(steps_of_attempt(run_dir, 3)) >= 10,
                "steps of the third attempt",
                [log],
                alive=run.process,
                seconds=300,
            )
            starts = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "start"]
            assert [start["world_size"] for start in starts] == [4, 3, 4]
            mended = read_attempts(run_dir)[1]
            assert (mended["exit_code"], mended["restart"], mended["steps_lost"]) == (75, True, 0)
            assert mended["checkpoint_step"] == mended["last_step"] == min(steps_of_attempt(run_dir, 3)) - 1
            run.process.terminate()
            assert run.process.wait(120) == 75
            assert variables["AWS_SECRET_ACCESS_KEY"] not in log.read_text()
            until(lambda: no_process_left(hosts), "the end of all processes", [log])
        finally:
            run.process.kill()
            run.process.wait()

    # 4 ranks again, on the samples that one would have had.
    reference = on_one_device(run_dir, mended["checkpoint_step"], shards, tmp_path, steps=10)
    third = losses_of_attempt(run_dir, 3)
    for step in sorted(reference)[:10]:
        assert third[step] == pytest.approx(reference[step], rel=1e-5)

    # What a checkpoint takes is what `pretrain launch plan` says, but for the files' own headers.
    config = load_config(recipe)
    files = committed(run_dir)[-1].glob("rank-*.safetensors")
    said = checkpoint_bytes(config, cost_of(config, 6))
    assert sum(file.stat().st_size for file in files) == pytest.approx(said, rel=0.25)
