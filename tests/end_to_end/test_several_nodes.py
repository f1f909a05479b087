"""Training over several nodes: workers as PID 1 in namespaces of their own, and hosts over real ssh."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from launched_hosts import PATIENCE_SECONDS, Launched, no_process_left, steps_of_attempt, until
from launching import ROOT, clean_environment, free_port
from services.required import skip_or_fail
from services.ssh_hosts import Hosts
from small_run import RECIPE

from launch.processes import children_of
from pretrain.checkpoint.attempts import exit_records, read_attempts
from pretrain.checkpoint.manifest import committed
from pretrain.metrics.journal import read_journal


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    """Of a run that goes on until it is ended."""
    path = tmp_path / "recipe.yaml"
    sections = {
        **RECIPE,
        "run_dir": str(tmp_path / "run"),
        "data": {**RECIPE["data"], "train": str(shards), "workers": 0},
        "train": {**RECIPE["train"], "steps": 1_000_000},
        "checkpoint": {"every_steps": 3, "keep_last": 2},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


class Pod:
    """`pretrain launch worker` as PID 1, with the environment of an Indexed Job's pod."""

    def __init__(self, index: int, recipe: Path, port: int, log: Path) -> None:
        self.log = log
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            sys.executable,
            "-m",
            "pretrain.cli",
        ]
        environment = {"NNODES": "2", "JOB_COMPLETION_INDEX": str(index), "MASTER_ADDR": "127.0.0.1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "launch", "worker", str(recipe), "--processes", "1"],
                env=clean_environment(**environment, MASTER_PORT=str(port)),
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )

    def first_process(self) -> int:
        """As seen from outside, the number of what is 1 inside."""
        [pid] = children_of(self.process.pid)
        return pid

    def states_inside(self) -> list[str]:
        """Of what the first process is the parent of."""
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in children_of(self.first_process())]
        return [stat.rpartition(")")[2].split()[0] for stat in stats]


@pytest.fixture
def pods(tmp_path: Path, recipe: Path) -> Iterator[Callable[[int], Pod]]:
    probe = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "true"], capture_output=True)
    if probe.returncode:
        skip_or_fail(f"PID namespaces cannot be made here: {probe.stderr.decode().strip()}")
    port, started = free_port(), []

    def start(index: int) -> Pod:
        started.append(Pod(index, recipe, port, tmp_path / f"pod-{index}.log"))
        return started[-1]

    yield start
    for pod in started:
        if pod.process.poll() is None:
            pod.process.kill()
            pod.process.wait()


@pytest.mark.slow
def test_pods_train_together_go_on_when_one_was_lost_and_save_when_one_is_told_to(
    pods: Callable[[int], Pod], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first, second = pods(0), pods(1)
    logs = [first.log, second.log]
    until(
        lambda: len(steps_of_attempt(run_dir, 1)) >= 4,
        "steps of the first attempt",
        logs,
        alive=first.process,
    )

    # PID 1 inherits whoever loses its parent, and collects it. SIGTERM has no default action there: it is handled.
    lost = [
        "nsenter",
        "--target",
        str(first.first_process()),
        "--pid",
        "--mount",
        "sh",
        "-c",
        "(sleep 0.3 &)",
    ]
    subprocess.run(lost, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(1.0)
    assert "Z" not in first.states_inside()

    os.kill(second.first_process(), signal.SIGKILL)  # the pod is lost with its rank
    second.process.wait()
    until(lambda: read_attempts(run_dir), "the end of the first attempt", logs)
    [line] = read_attempts(run_dir)
    assert (line["attempt"], line["exit_code"], line["restart"], line["world_size"]) == (1, 1, True, 2)
    assert "node 1 was lost" in line["reason"]
    assert line["steps_lost"] == line["last_step"] - line["checkpoint_step"]

    second = pods(1)  # Kubernetes makes it again
    until(
        lambda: len(steps_of_attempt(run_dir, 2)) >= 2,
        "steps of the second attempt",
        logs,
        alive=first.process,
    )
    assert min(steps_of_attempt(run_dir, 2)) == line["checkpoint_step"] + 1
    os.kill(second.first_process(), signal.SIGTERM)
    assert [pod.process.wait(PATIENCE_SECONDS) for pod in (first, second)] == [75, 75]
    last = read_attempts(run_dir)[-1]
    assert (last["attempt"], last["exit_code"], last["restart"], last["steps_lost"]) == (2, 75, False, 0)
    assert {record["code"] for record in exit_records(run_dir, 2).values()} == {75}


@pytest.mark.slow
def test_hosts_train_together_save_when_told_to_and_no_secret_is_on_a_command_line(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run = Launched(hosts, recipe, log)
    try:
        until(
            lambda: len(steps_of_attempt(run_dir, 1)) >= 4,
            "steps of the first attempt",
            [log],
            alive=run.process,
        )
        commands = b"".join(
            Path(f"/proc/{pid}/cmdline").read_bytes() for name in hosts.names for pid in hosts.pids(name)
        )
        assert b"geheim-4711" not in commands
        ranks = [pid for pid in hosts.pids("h1") if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        assert any(
            b"AWS_SECRET_ACCESS_KEY=geheim-4711" in Path(f"/proc/{p}/environ").read_bytes() for p in ranks
        )

        # A rank is killed on h1: the attempt ends on all, and the next one goes on from the newest checkpoint.
        os.kill(min(ranks), signal.SIGKILL)
        until(
            lambda: len(steps_of_attempt(run_dir, 2)) >= 2,
            "steps of the second attempt",
            [log],
            alive=run.process,
        )
        [line] = read_attempts(run_dir)
        assert (line["exit_code"], line["rank"], line["host"], line["restart"]) == (1, 1, "h1", True)
        assert (line["world_size"], "SIGKILL" in line["reason"]) == (3, True)

        run.process.terminate()
        assert run.process.wait(PATIENCE_SECONDS) == 75
        hosts_of_ranks = {r: e["host"] for r, e in exit_records(run_dir, 2).items()}
        assert hosts_of_ranks == {0: "h0", 1: "h1", 2: "h2"}
        assert {record["code"] for record in exit_records(run_dir, 2).values()} == {75}
        assert json.loads((committed(run_dir)[-1] / "manifest.json").read_text())["world_size"] == 3
        until(lambda: no_process_left(hosts), "the end of all processes", [log])
    finally:
        run.process.kill()
        run.process.wait()


def worker_on(hosts: Hosts, name: str) -> int:
    """The process that `pretrain launch hosts` has started there over ssh."""
    found = []
    for pid in hosts.pids(name):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if {b"launch", b"worker", b"--stdio"} <= {*words}:
                found.append(pid)
    return min(found)


@pytest.mark.slow
def test_sigterm_to_the_worker_of_one_host_lets_all_save_at_one_step_and_ends_with_75(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run = Launched(hosts, recipe, log)
    try:
        until(
            lambda: len(steps_of_attempt(run_dir, 1)) >= 4,
            "steps of the first attempt",
            [log],
            alive=run.process,
        )
        os.kill(worker_on(hosts, "h1"), signal.SIGTERM)
        assert run.process.wait(PATIENCE_SECONDS) == 75, log.read_text()
        until(lambda: no_process_left(hosts), "the end of all processes", [log])
    finally:
        run.process.kill()
        run.process.wait()
    [line] = read_attempts(run_dir)
    assert (line["exit_code"], line["restart"], line["world_size"], line["steps_lost"]) == (75, False, 3, 0)
    records = exit_records(run_dir, 1)
    assert {rank: (record["host"], record["code"]) for rank, record in records.items()} == {
        0: ("h0", 75),
        1: ("h1", 75),
        2: ("h2", 75),
    }
    # Nobody had done more than what was saved.
    step = line["checkpoint_step"]
    assert {record["reason"] for record in records.values()} == {f"asked to stop, saved at step {step}"}
    assert line["last_step"] == step
    assert committed(run_dir)[-1].name == f"step-{step:08d}"


@pytest.mark.slow
def test_a_host_that_dies_ends_the_attempt_and_the_run_goes_on_with_those_left(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    options = ["--least-nodes", "2", "--rendezvous-seconds", "10", "--silence-seconds", "8"]
    run = Launched(hosts, recipe, log, *options)
    try:
        until(
            lambda: len(steps_of_attempt(run_dir, 1)) >= 4,
            "steps of the first attempt",
            [log],
            alive=run.process,
        )
        hosts.kill("h2")
        died_at = time.monotonic()
        until(lambda: read_attempts(run_dir), "the end of the first attempt", [log])
        assert time.monotonic() - died_at < 60
        [line] = read_attempts(run_dir)
        assert "h2 was lost" in line["reason"]
        assert (line["exit_code"], line["world_size"], line["restart"]) == (1, 3, True)
        until(
            lambda: len(steps_of_attempt(run_dir, 2)) >= 2,
            "steps of the second attempt",
            [log],
            alive=run.process,
        )
        starts = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "start"]
        assert [start["world_size"] for start in starts] == [3, 2]
        assert "going on without h2" in log.read_text()

        # Whoever started it is killed: nothing goes on by itself, on any host.
        run.process.kill()
        run.process.wait()
        until(lambda: no_process_left(hosts), "the end of all processes", [log])
    finally:
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
def test_a_cut_cable_ends_both_sides_within_the_silence_and_a_wrong_host_is_refused_with_2(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run = Launched(hosts, recipe, log, "--max-restarts", "0", "--silence-seconds", "8")
    try:
        until(
            lambda: len(steps_of_attempt(run_dir, 1)) >= 4,
            "steps of the first attempt",
            [log],
            alive=run.process,
        )
        hosts.cut("h1")
        assert run.process.wait(90) == 1
        assert "h1 was lost" in log.read_text()
        until(lambda: no_process_left(hosts), "the end of all processes, also behind the cut", [log])
    finally:
        run.process.kill()
        run.process.wait()
    asked = time.monotonic()
    run = Launched(hosts, recipe, tmp_path / "log-2")
    assert run.process.wait(60) == 2
    assert time.monotonic() - asked < 30
    assert "h1: ssh could not get there" in (tmp_path / "log-2").read_text()
    until(lambda: no_process_left(hosts), "the end of all processes", [tmp_path / "log-2"])
