"""A tiny run, its processes, and what it leaves behind. Called by player.py, references.py and the tests.

A run is started as a user does, by `pretrain launch local`; whatever it starts carries a mark in its
environment, by which it is found again, whoever its parent is by then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from launching import ROOT, clean_environment, free_port

from pretrain.checkpoint.attempts import read_attempts
from pretrain.checkpoint.manifest import committed, step_folder
from pretrain.metrics.journal import read_journal, steps_of

INJECTED = Path(__file__).resolve().parent / "injected"
MARK = "MATRIX_MARK"
STEPS, SAVE_EVERY, BATCH = 24, 4, 16
PATIENCE_SECONDS = 120.0  # for what should take a few seconds, on machines that are busy with something else
START_SECONDS = 90.0

RECIPE: dict[str, Any] = {
    "seed": 3,
    "model": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "drop_path_rate": 0.1,
    },
    "data": {"workers": 0, "color_jitter": 0.2},
    "train": {"global_batch_size": BATCH, "steps": STEPS, "precision": "float32"},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every_steps": SAVE_EVERY, "keep_last": 10},
}

Tree = Mapping[str, Any]


def merged(base: Tree, changes: Tree) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = merged(old, value) if both else value
    return result


def write_shards(folder: Path) -> Path:
    """150 images of 6 classes, packed by the project's own commands: two and a half epochs of a run."""
    images, shards = str(folder / "images"), folder / "shards"
    for arguments in (
        ["synth", images, "--samples", "150", "--image-size", "32", "--classes", "6"],
        ["pack", images, str(shards), "--chunk-samples", "16"],
    ):
        command = [sys.executable, "-m", "pretrain.cli", "data", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=ROOT)
        assert done.returncode == 0, done.stderr
    return shards


@dataclass(frozen=True, kw_only=True)
class Process:
    pid: int
    parent: int
    command: str
    rank: int | None

    @property
    def is_rank(self) -> bool:
        return self.rank is not None and (
            "pretrain.cli train" in self.command or "pretrain.train" in self.command
        )

    @property
    def is_writer(self) -> bool:
        return "pretrain.checkpoint.writer" in self.command

    @property
    def is_fork_server(self) -> bool:
        return "multiprocessing.forkserver" in self.command


def processes_of(mark: str) -> list[Process]:
    """Those that were started, by whomever, with that mark; ended ones that wait for their parent are none."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() not in environment:
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it ended, or is not ours
            continue
        rank = next((int(line[5:]) for line in environment if line.startswith(b"RANK=")), None)
        if command:
            found.append(Process(pid=int(entry.name), parent=parent, command=command, rank=rank))
    return found


def shared_memory() -> set[str]:
    """What has a name in the memory that processes share."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(
    condition: Callable[[], bool], what: str | Callable[[], str], *, seconds: float = PATIENCE_SECONDS
) -> None:
    """Wait for `condition`; looks often, as faults must strike where they are meant to."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"{what if isinstance(what, str) else what()} did not happen within {seconds:g} s"
            )
        time.sleep(0.003)


@dataclass(kw_only=True)
class Run:
    """One run's folder and the launches that work on it, one after another.

    `world_size` ranks under `pretrain launch local`; 0 is one process without a launcher. `changes` to the
    recipe, `max_restarts` for the launcher, `faults` for injected/sitecustomize.py, `environment` for all processes.
    """

    folder: Path
    shards: str
    world_size: int = 2
    zero_stage: int = 1
    changes: Tree = field(default_factory=dict)
    max_restarts: int | None = None
    faults: Sequence[Tree] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    launches: int = 0
    at_the_end: list[Callable[[], object]] = field(default_factory=list)  # for `close`

    def __post_init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        # Not below pytest's own: names of sockets must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="matrix-"))
        self.memory_before = shared_memory()
        self.folder.mkdir(parents=True, exist_ok=True)

    # What it is.

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def recipe(self) -> Path:
        own = {
            "run_dir": str(self.run_dir),
            "data": {"train": self.shards, "cache_dir": str(self.folder / "cache")},
            "deepspeed": {"zero_optimization": {"stage": self.zero_stage}},
        }
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(merged(merged(RECIPE, own), self.changes)))
        return path

    def mark_of(self, number: int) -> Path:
        """Where the `number`-th injected fault notes that it struck; each rank appends its own to the name."""
        return self.folder / f"struck-{number}"

    def moments_of(self, number: int) -> list[float]:
        """When that fault struck, by the monotonic clock."""
        texts = [path.read_text() for path in self.folder.glob(f"struck-{number}.*")]
        return [float(text) for text in texts if text]

    # Starting and ending it.

    def command(self) -> list[str]:
        pretrain = [sys.executable, "-m", "pretrain.cli"]
        if self.world_size == 0:
            return [*pretrain, "train", str(self.recipe())]
        command = [*pretrain, "launch", "local", str(self.recipe()), "--processes", str(self.world_size)]
        return command if self.max_restarts is None else [*command, "--max-restarts", str(self.max_restarts)]

    def start(self, command: Sequence[str] | None = None) -> None:
        assert self.process is None or self.process.poll() is not None, "it is still running"
        self.launches += 1
        faults = self.folder / "faults.json"
        faults.write_text(json.dumps([dict(fault) for fault in self.faults]))
        environment = clean_environment(
            PYTHONPATH=f"{INJECTED}:{ROOT}",
            TMPDIR=str(self.temporary),
            MATRIX_FAULTS=str(faults),
            **{MARK: self.mark},
            **self.environment,
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command or self.command(),
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # What runs the tests in the background has us, and so them, ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type,return-value]
            )

    @property
    def log(self) -> Path:
        return self.folder / f"launch-{self.launches}.log"

    def said(self) -> str:
        """By all launches."""
        logs = (self.folder / f"launch-{number}.log" for number in range(1, self.launches + 1))
        return "".join(log.read_text(errors="replace") for log in logs)

    def wait_for(
        self, condition: Callable[[], bool], what: str, *, seconds: float = PATIENCE_SECONDS
    ) -> None:
        """Fails when the launch ends before `condition` holds."""
        assert self.process is not None
        process = self.process
        until(lambda: condition() or process.poll() is not None, what, seconds=seconds)
        if not condition():
            raise AssertionError(f"ended with {self.end()} before {what}:\n{self.said()[-4000:]}")

    def end(self, *, seconds: float = PATIENCE_SECONDS) -> int:
        """The launch's exit code, as a shell shows it."""
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s:\n{self.said()[-4000:]}") from None
        return 128 - code if code < 0 else code

    def close(self) -> None:
        """End whatever is left, for a test that failed, and drop the folder of temporary files."""
        for process in processes_of(self.mark):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None:
            self.process.wait()
        for end in self.at_the_end:
            end()
        shutil.rmtree(self.temporary, ignore_errors=True)

    # Looking at it.

    def processes(self) -> list[Process]:
        return processes_of(self.mark)

    def ranks(self) -> dict[int, int]:
        """rank -> process id."""
        return {p.rank: p.pid for p in self.processes() if p.is_rank and p.rank is not None}

    def loader_workers(self, rank: int = 0) -> list[int]:
        found = self.processes()
        servers = {p.pid for p in found if p.is_fork_server}
        return [p.pid for p in found if p.is_fork_server and p.parent in servers and p.rank in (rank, None)]

    def writers(self) -> dict[int, int]:
        return {p.rank or 0: p.pid for p in self.processes() if p.is_writer}

    def journal(self) -> list[dict[str, Any]]:
        path = self.run_dir / "journal.jsonl"
        return read_journal(path) if path.exists() else []

    def last_step(self) -> int:
        """The last one that any attempt did."""
        return max(steps_of(self.journal()), default=0)

    def losses(self) -> dict[int, float]:
        return {step: line["loss"] for step, line in steps_of(self.journal()).items()}

    def attempts(self) -> int:
        """How many have begun to train."""
        return len({line["attempt"] for line in self.journal() if line["event"] == "start"})

    def is_saving(self, step: int | None = None) -> bool:
        folder = "step-*" if step is None else step_folder(step)
        return any(self.checkpoints.glob(f"{folder}.*saving"))

    def committed_steps(self) -> list[int]:
        return [int(folder.name.removeprefix("step-")) for folder in committed(self.run_dir)]

    def attempt_lines(self) -> list[dict[str, Any]]:
        """As the supervisor wrote them down."""
        return read_attempts(self.run_dir)


class Scraper:
    """Reads a run's metrics while it lives; `highest` is by attempt (a counter begins anew in each) and name."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.highest: dict[str, float] = {}

    @classmethod
    def of(cls, run: Run) -> Scraper:
        """For a run that is still to be started: gives it a port."""
        port = free_port()
        run.changes = merged(run.changes, {"metrics": {"port": port}})
        return cls(port)

    def look(self) -> None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except (OSError, urllib.error.URLError):
            return
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                self.highest[name] = max(self.highest.get(name, 0.0), float(value))
