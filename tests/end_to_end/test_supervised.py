"""`pretrain launch local` over real ranks: what happens to one of them, or to the supervisor, and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment
from small_run import RECIPE

from launch.processes import children_of
from pretrain.checkpoint.attempts import exit_records, read_attempts
from pretrain.metrics.journal import read_journal

PATIENCE_SECONDS = 90


class Supervised:
    """A launched run; its processes are found by a mark in their environment, whoever their parent is."""

    def __init__(self, recipe: Path, run_dir: Path, log: Path, *options: str) -> None:
        self.run_dir, self.log, self._mark = run_dir, log, uuid.uuid4().hex
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pretrain.cli",
                    "launch",
                    "local",
                    str(recipe),
                    "--processes",
                    "2",
                    *options,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment(SUPERVISED_MARK=self._mark),
                cwd=ROOT,
            )

    def pids(self) -> dict[int, dict[str, str]]:
        """Environments by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit():
                    words = (entry / "environ").read_bytes().split(b"\0")
                    if f"SUPERVISED_MARK={self._mark}".encode() in words:
                        found[int(entry.name)] = dict(w.decode().split("=", 1) for w in words if b"=" in w)
            except OSError:
                continue
        return found

    def rank(self, number: int) -> int:
        """Its process: the eldest with that rank, the others are what it started."""
        return min(pid for pid, env in self.pids().items() if env.get("RANK") == str(number))

    def is_loader_worker(self, pid: int) -> bool:
        """Its parent is the fork server, which is a rank's child."""
        servers = {child for rank in (0, 1) for child in children_of(self.rank(rank))}
        return any(pid in children_of(server) for server in servers)

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in time:\n{self.log.read_text()}"
            time.sleep(0.02)

    def steps_of_attempt(self, attempt: int) -> list[int]:
        journal = self.run_dir / "journal.jsonl"
        if not journal.exists():
            return []
        return [r["step"] for r in read_journal(journal) if r["event"] == "step" and r["attempt"] == attempt]


@pytest.fixture
def endless(tmp_path: Path, shards: Path) -> Path:
    """A recipe of a run that goes on until it is ended."""
    path = tmp_path / "recipe.yaml"
    sections = {
        **RECIPE,
        "run_dir": str(tmp_path / "run"),
        "data": {**RECIPE["data"], "train": str(shards)},
        "train": {**RECIPE["train"], "steps": 1_000_000},
        "checkpoint": {"every_steps": 3, "keep_last": 2},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def test_a_rank_told_to_stop_then_one_killed_are_restarted_and_a_killed_supervisor_leaves_nobody(
    endless: Path, tmp_path: Path
) -> None:
    run = Supervised(endless, tmp_path / "run", tmp_path / "log")
    try:
        # One rank alone is told to stop, again and again: all agree, save, and go on in a new attempt.
        run.until(lambda: len(run.steps_of_attempt(1)) >= 4, "steps of the first attempt")
        told = run.rank(1)

        def told_again_and_has_ended() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(
                    told, signal.SIGTERM
                )  # whatever it is doing by now: saving, or about to say that it has
            return len(read_attempts(run.run_dir)) == 1

        run.until(told_again_and_has_ended, "the end of the first attempt")
        assert f"rank 1 (process {told}) ended with exit code 75" in run.log.read_text()
        [first] = read_attempts(run.run_dir)
        assert (first["attempt"], first["exit_code"], first["restart"]) == (1, 75, True)
        assert first["last_step"] == first["checkpoint_step"] == max(run.steps_of_attempt(1))
        assert first["steps_lost"] == 0
        assert {record["code"] for record in exit_records(run.run_dir, 1).values()} == {75}

        # One rank is killed: the other notices, and a third attempt goes on from the newest checkpoint.
        run.until(lambda: len(run.steps_of_attempt(2)) >= 4, "steps of the second attempt")
        assert min(run.steps_of_attempt(2)) == first["last_step"] + 1
        os.kill(run.rank(1), signal.SIGKILL)
        run.until(lambda: len(read_attempts(run.run_dir)) == 2, "the end of the second attempt")
        second = read_attempts(run.run_dir)[1]
        assert (second["attempt"], second["exit_code"], second["rank"], second["restart"]) == (2, 1, 1, True)
        assert "SIGKILL" in second["reason"]
        assert second["steps_lost"] == second["last_step"] - second["checkpoint_step"]
        assert exit_records(run.run_dir, 2)[0]["error"] == "LostPeerError"

        # The supervisor is killed, with a loader worker that cannot do anything for itself.
        run.until(lambda: len(run.steps_of_attempt(3)) >= 2, "steps of the third attempt")
        assert min(run.steps_of_attempt(3)) == second["checkpoint_step"] + 1
        started = run.pids()
        workers = [pid for pid in started if run.is_loader_worker(pid)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGSTOP)
        run.process.kill()
        run.process.wait()
        run.until(lambda: not run.pids(), f"the end of {sorted(run.pids())}")
    finally:
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
