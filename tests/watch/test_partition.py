"""Two hosts that cannot reach each other any more: both sides end in time, and only one has ever written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment
from two_hosts import two_hosts
from watched_runs import BOUND_SECONDS, PATIENCE_SECONDS, RECIPE, START_SECONDS

from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed
from pretrain.metrics.journal import read_journal, steps_of

STEP_SECONDS = 20.0  # long enough for a second attempt to be refused meanwhile
TRAIN = [sys.executable, "-m", "pretrain.cli", "train"]


@pytest.mark.slow
def test_when_the_network_parts_two_hosts_both_sides_end_and_one_has_written(tmp_path: Path, shards: Path):
    run_dir = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    sections = {
        **RECIPE,
        "run_dir": str(run_dir),
        "data": {"workers": 0, "train": str(shards)},
        "watchdog": {"step_seconds": STEP_SECONDS, "start_seconds": START_SECONDS},
    }
    recipe.write_text(yaml.safe_dump(sections))
    journal = run_dir / "journal.jsonl"
    started: list[subprocess.Popen] = []

    def start(hosts, host: str, name: str, **variables: str) -> subprocess.Popen:
        with (tmp_path / name).open("w") as log:
            started.append(
                subprocess.Popen(
                    hosts.command(host, [*TRAIN, str(recipe)]),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=clean_environment(GLOO_SOCKET_IFNAME="eth0", **variables),
                    cwd=ROOT,
                )
            )
        return started[-1]

    with two_hosts() as hosts:
        world = {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": hosts.address("h1"),
            "MASTER_PORT": "29511",
        }
        try:
            ranks = [
                start(hosts, host, f"log-{i}", RANK=str(i), **world) for i, host in enumerate(hosts.names)
            ]
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not journal.exists() or max(steps_of(read_journal(journal)), default=0) < 7:
                assert all(rank.poll() is None for rank in ranks), (tmp_path / "log-0").read_text()
                assert time.monotonic() < deadline, "it did not start in time"
                time.sleep(0.05)
            hosts.cut()
            cut_at = time.monotonic()
            time.sleep(0.5)
            step_at_cut = max(steps_of(read_journal(journal)))
            # Whoever restarts the side that is cut off finds the run taken as long as the other side lives.
            second = start(hosts, "h2", "log-second")
            ended: dict[int, float] = {}
            while len(ended) < 2:
                for number, rank in enumerate(ranks):
                    if number not in ended and rank.poll() is not None:
                        ended[number] = time.monotonic() - cut_at
                late = time.monotonic() - cut_at - STEP_SECONDS - BOUND_SECONDS
                assert late < 0, [(tmp_path / f"log-{i}").read_text() for i in (0, 1)]
                time.sleep(0.05)
            second_code = second.wait(PATIENCE_SECONDS)
        finally:
            for process in started:
                process.kill()
                process.wait()

    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
    for number, host in enumerate(hosts.names):
        record = json.loads((run_dir / "attempts" / "1" / f"watchdog-{number}.json").read_text())
        assert (record["rank"], record["host"], record["kind"]) == (number, host, "waiting")
        assert record["at_fault"] == []
        assert "the network between the hosts does not carry" in record["conclusion"]
        assert "rank 0 on host h1, rank 1 on host h2" in record["conclusion"]
        assert "distributed_c10d" in (run_dir / "attempts" / "1" / f"stacks-{number}.txt").read_text()
    assert second_code == 2, (tmp_path / "log-second").read_text()
    assert "is in use by process" in (tmp_path / "log-second").read_text()

    lines = read_journal(journal)
    assert {line["attempt"] for line in lines} == {1}
    assert max(steps_of(lines)) == step_at_cut  # nobody went on alone
    assert committed(run_dir)
    for checkpoint in committed(run_dir):
        assert load_weights(checkpoint)
