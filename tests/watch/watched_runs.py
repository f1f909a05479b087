"""Runs of real ranks that meet trouble, for the tests of watchdogs and of slow ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml
from launching import ROOT, clean_environment

from pretrain.metrics.journal import read_journal, steps_of

STEP_SECONDS = 6.0
START_SECONDS = 90.0
BOUND_SECONDS = 10.0
PATIENCE_SECONDS = 180.0
RECIPE = {
    "seed": 3,
    "model": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
    "train": {"global_batch_size": 16, "steps": 100_000, "precision": "float32"},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every_steps": 5, "keep_last": 3},
    "watchdog": {"step_seconds": STEP_SECONDS, "start_seconds": START_SECONDS},
}


class Launch:
    """A launcher with its ranks, all found again by a mark in their environment."""

    def __init__(
        self,
        folder: Path,
        shards: Path,
        command: Sequence[str],
        *,
        inject: Sequence[dict] = (),
        overrides: Sequence[str] = (),
        name: str = "run",
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.run_dir, self.log = folder / name, folder / f"log-{self.mark}"
        recipe = folder / f"{name}.yaml"
        data = {"workers": 0, "train": str(shards)}
        recipe.write_text(yaml.safe_dump({**RECIPE, "run_dir": str(self.run_dir), "data": data}))
        variables = clean_environment(
            INJECT=json.dumps(list(inject)), LAUNCH_MARK=self.mark, GLOO_SOCKET_IFNAME="lo"
        )
        variables["PYTHONPATH"] = f"{ROOT}:{Path(__file__).parent / 'injected'}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [word if word != "RECIPE" else str(recipe) for word in command] + list(overrides),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=ROOT,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.log.read_text()

    def steps(self) -> int:
        journal = self.run_dir / "journal.jsonl"
        return max(steps_of(read_journal(journal)), default=0) if journal.exists() else 0

    def events(self, name: str) -> list[dict]:
        return [line for line in read_journal(self.run_dir / "journal.jsonl") if line["event"] == name]

    def processes(self) -> dict[int, dict[str, str]]:
        """The environments of all processes that this launch brought into being and that are still there."""
        found = {}
        for process in psutil.process_iter():
            try:
                if (
                    process.status() != psutil.STATUS_ZOMBIE
                    and process.environ().get("LAUNCH_MARK") == self.mark
                ):
                    found[process.pid] = process.environ()
            except psutil.Error:
                continue
        return found

    def ranks(self) -> dict[int, int]:
        """The process ids of the ranks, which are not those of watchdogs, launchers or loader workers."""
        found = {}
        for pid, environment in self.processes().items():
            command = psutil.Process(pid).cmdline()
            if "RANK" in environment and {"pretrain.cli", "pretrain.train"} & set(command[:4]):
                found[int(environment["RANK"])] = pid
        return found

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.said()}"
            assert time.monotonic() < deadline, f"{what} did not happen in time:\n{self.said()}"
            time.sleep(0.05)

    def end(self) -> int:
        code = self.process.wait(PATIENCE_SECONDS)
        deadline = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < deadline, f"processes are left: {[psutil.Process(p) for p in left]}"
            time.sleep(0.05)
        return code

    @property
    def attempt(self) -> Path:
        """What the first attempt left."""
        return self.run_dir / "attempts" / "1"

    def record(self, rank: int) -> dict:
        return json.loads((self.attempt / f"watchdog-{rank}.json").read_text())

    def exit_record(self, rank: int) -> dict:
        return json.loads((self.attempt / f"exit-{rank}.json").read_text())

    def stacks(self, rank: int) -> str:
        return (self.attempt / f"stacks-{rank}.txt").read_text()

    def kill(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self.process.wait()


def launch_local(ranks: int) -> list[str]:
    return [sys.executable, "-m", "pretrain.cli", "launch", "local", "RECIPE", "--processes", str(ranks)]
