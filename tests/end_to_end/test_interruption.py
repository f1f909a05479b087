"""Ctrl-C at any moment: exit code 130, nothing half-written, nothing left running, and the run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment
from small_run import RECIPE

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.metrics.journal import read_journal, steps_of

PATIENCE_SECONDS = 120  # for machines that are busy with something else


def running(mark: str) -> list[str]:
    """Command lines of the processes that were started, by whomever, under a `Session` of that mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"SESSION_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended, or is not ours
    return [command for command in found if command]  # an ended one that waits for its parent has none


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.005)


class Session:
    """A command in a terminal of its own, in which Ctrl-C reaches all of the foreground's processes."""

    def __init__(self, arguments: list[str], log: Path, **environment: str) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.cli", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=clean_environment(SESSION_MARK=self.mark, **environment),
                cwd=ROOT,
                start_new_session=True,
                # A shell that runs the tests in the background would have us and ours ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        until(lambda: condition() or self.process.poll() is not None, what)
        assert self.process.poll() is None, f"it ended before {what}:\n{self.said()}"

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def said(self) -> str:
        return self.log.read_text()

    def exit_code(self) -> int:
        """As a shell shows it; then no process that the command started may be left."""
        code = self.process.wait(PATIENCE_SECONDS)
        # The fork server of the loader's workers ends once it sees that we have.
        until(lambda: not running(self.mark), f"the end of {running(self.mark)}")
        assert "Traceback" not in self.said(), self.said()
        # Python ends itself by the signal, which a shell shows as 130, when Ctrl-C met it inside exec().
        return 128 - code if code < 0 else code


@contextmanager
def session(arguments: list[str], log: Path, **environment: str) -> Iterator[Session]:
    started = Session(arguments, log, **environment)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()


def steps_in(run_dir: Path) -> int:
    journal = run_dir / "journal.jsonl"
    return max(steps_of(read_journal(journal)), default=0) if journal.exists() else 0


def check_whole(run_dir: Path) -> None:
    """Every listed checkpoint loads, and what is not listed is not there but as leftovers with a name of their own."""
    for checkpoint in committed(run_dir):
        assert load_weights(checkpoint)
    leftovers = {p.name for p in (run_dir / "checkpoints").iterdir()} - {p.name for p in committed(run_dir)}
    assert all(name.endswith(".saving") for name in leftovers), leftovers


def endings(run_dir: Path) -> dict[int, set[int]]:
    """Exit codes of all ranks by attempt, as the run's folder records them."""
    codes: dict[int, set[int]] = {}
    for record in sorted((run_dir / "attempts").glob("*/exit-*.json")):
        codes.setdefault(int(record.parent.name), set()).add(json.loads(record.read_text())["code"])
    return codes


@pytest.fixture
def endless(tmp_path: Path, shards: Path) -> Path:
    """A recipe of a run that would go on for hours, saving and validating after every step."""
    path = tmp_path / "recipe.yaml"
    sections = {
        **RECIPE,
        "run_dir": str(tmp_path / "run"),
        "data": {**RECIPE["data"], "train": str(shards), "val": str(shards)},
        "train": {**RECIPE["train"], "steps": 1_000_000},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "eval": {"every_steps": 1},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.mark.parametrize(
    "imported", ["pretrain.checkpoint.manifest", "pretrain.config.load", "torch", "pretrain.assemble"]
)
def test_ctrl_c_before_the_run_has_begun_ends_it_with_130(
    endless: Path, tmp_path: Path, imported: str
) -> None:
    # Python tells of each import once it is done.
    with session(["train", str(endless)], tmp_path / "log", PYTHONPROFILEIMPORTTIME="1") as train:
        train.wait_for(
            lambda: any(line.endswith(f" {imported}") for line in train.said().splitlines()), imported
        )
        train.ctrl_c()
        assert train.exit_code() == 130
    assert "stopped by Ctrl-C" in train.said() or "stopped and saved at step" in train.said()


def test_ctrl_c_while_the_loader_starts_ends_after_the_first_step_and_its_save(
    endless: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with session(["train", str(endless)], tmp_path / "log") as train:
        train.wait_for(lambda: "steps on 1 rank" in train.said(), "the start of the loader")
        time.sleep(0.1)
        train.ctrl_c()
        assert train.exit_code() == 130
    if "stopped by Ctrl-C" not in train.said():  # it came a moment too early for that
        assert "Ctrl-C: saving what was learned, then ending" in train.said()
        assert read_manifest(find_newest(run_dir)).step == steps_in(run_dir) == 1


def test_the_first_ctrl_c_saves_the_second_aborts_and_each_time_the_run_goes_on(
    endless: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with session(["train", str(endless)], tmp_path / "log-1") as train:
        # The save and the validation of step 3 are under way, or have just been.
        train.wait_for(lambda: steps_in(run_dir) >= 3, "step 3")
        train.ctrl_c()
        assert train.exit_code() == 130
    stopped = steps_in(run_dir)
    assert f"stopped and saved at step {stopped}" in train.said()
    assert read_manifest(find_newest(run_dir)).step == stopped
    assert [p.name for p in committed(run_dir)] == sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert not (run_dir / "finished.json").exists()
    check_whole(run_dir)

    with session(["train", str(endless)], tmp_path / "log-2") as train:
        train.wait_for(lambda: steps_in(run_dir) >= stopped + 2, "two more steps")
        train.wait_for(lambda: any((run_dir / "checkpoints").glob("*.saving")), "a save")
        train.ctrl_c()
        train.ctrl_c()
        assert train.exit_code() == 130
    assert f"going on at step {stopped} of" in train.said()
    check_whole(run_dir)
    aborted = read_manifest(find_newest(run_dir)).step

    with session(["train", str(endless), f"train.steps={aborted + 2}"], tmp_path / "log-3") as train:
        assert train.exit_code() == 0
    assert f"going on at step {aborted} of" in train.said()
    assert endings(run_dir) == {1: {130}, 2: {130}, 3: {0}}
    check_whole(run_dir)
    assert [p.name for p in committed(run_dir)] == sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_ctrl_c_while_images_are_packed_leaves_a_packing_that_goes_on(
    endless: Path, shards: Path, tmp_path: Path
) -> None:
    arguments = [
        *("train", str(endless), "train.steps=1", "data.val=null", "data.workers=0"),
        *(f"data.train={shards.parent / 'images'}", f"data.cache_dir={tmp_path / 'cache'}"),
    ]
    with session(arguments, tmp_path / "log-1") as train:
        train.wait_for(lambda: any((tmp_path / "cache").glob("packed/*/pack-progress.json")), "the packing")
        train.ctrl_c()
        assert train.exit_code() == 130
    assert not list((tmp_path / "cache").rglob("index.safetensors"))
    assert not (tmp_path / "run").exists()
    with session(arguments, tmp_path / "log-2") as train:
        assert train.exit_code() == 0
    assert "packed 150 samples" in train.said()
    assert not list((tmp_path / "cache").rglob("pack-progress.json"))


def test_ctrl_c_on_two_launched_ranks_saves_or_aborts_and_leaves_no_process(
    endless: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    launch = [
        "launch",
        "local",
        str(endless),
        "--processes",
        "2",
        "data.workers=0",
        "eval.every_steps=100000",
    ]

    with session(launch, tmp_path / "log-1") as ranks:
        ranks.wait_for(lambda: len(running(ranks.mark)) >= 3, "the start of the ranks")
        time.sleep(1.0)  # in the midst of their imports
        ranks.ctrl_c()
        assert ranks.exit_code() == 130

    with session(launch, tmp_path / "log-2") as ranks:
        ranks.wait_for(lambda: steps_in(run_dir) >= 3, "step 3")
        ranks.ctrl_c()
        assert ranks.exit_code() == 130
    stopped = steps_in(run_dir)
    assert f"stopped and saved at step {stopped}" in ranks.said()
    assert read_manifest(find_newest(run_dir)).step == stopped
    assert max(endings(run_dir).items()) == (max(endings(run_dir)), {130})

    with session(launch, tmp_path / "log-3") as ranks:
        ranks.wait_for(lambda: steps_in(run_dir) >= stopped + 2, "two more steps")
        ranks.ctrl_c()
        ranks.wait_for(lambda: "press it again" in ranks.said(), "the supervisor's answer")
        ranks.ctrl_c()
        assert ranks.exit_code() == 130
    assert f"going on at step {stopped} of" in ranks.said()
    check_whole(run_dir)
