"""TensorBoard and W&B, with their own libraries: one run over attempts and rollbacks, and no harm when they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from metrics.tracker_files import history_of, records_of, scalars

from pretrain.errors import UsageError
from pretrain.metrics import wandb_tracker
from pretrain.metrics.journal import Journal
from pretrain.metrics.trackers import TensorBoard, Trackers
from pretrain.metrics.wandb_tracker import WandbTracker

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")


def wandb_of(run_dir: Path, *, mode: str = "offline", strict: bool = True) -> WandbTracker:
    return WandbTracker(
        run_dir,
        run_id="abc123",
        project="tests",
        entity=None,
        name=None,
        mode=mode,
        config={"optim": {"lr": 0.1}},
        strict=strict,
    )


def attempt(run_dir: Path, number: int, steps: list[int], *, tracker: Any, begin: int) -> None:
    """An attempt that logs `steps`, each with the loss number + step / 1000, and validates at multiples of 4."""
    journal = Journal(run_dir / "journal.jsonl", attempt=number)
    trackers = Trackers([tracker], attempt=number, notes={})
    trackers.begin(begin)
    for step in steps:
        fields = {"samples": 8 * step, "loss": number + step / 1000, "lr": 0.1}
        journal.append("step", step=step, **fields)
        trackers.step(step, fields)
        if step % 4 == 0:
            journal.append("validation", step=step)
            trackers.validation(step, {"top1": number + step / 1000})
    assert trackers.troubles() == {}
    trackers.close(finished=True)
    journal.close()


def test_tensorboard_shows_of_each_step_what_was_done_last_over_restarts_and_rollbacks(
    tmp_path: Path,
) -> None:
    attempt(tmp_path, 1, list(range(1, 15)), tracker=TensorBoard(tmp_path), begin=0)
    # From the checkpoint of step 8 on; in it, back from 12 to 10.
    attempt(tmp_path, 2, [9, 10, 11, 12, 11, 12, 13], tracker=TensorBoard(tmp_path), begin=8)
    losses = scalars(tmp_path / "tensorboard", "train/loss")
    assert [step for step, _ in losses] == list(range(1, 14))
    assert [value for _, value in losses] == pytest.approx(
        [(1 if step <= 8 else 2) + step / 1000 for step in range(1, 14)]
    )
    assert scalars(tmp_path / "tensorboard", "validation/top1") == [
        (4, pytest.approx(1.004)),
        (8, pytest.approx(1.008)),
        (12, pytest.approx(2.012)),
    ]


def test_tensorboard_without_a_folder_to_write_to_is_given_up_and_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file stands in the way")
    trackers = Trackers([TensorBoard(tmp_path)], attempt=1, notes={})
    trackers.begin(0)
    trackers.step(1, {"loss": 1.0})
    assert "tensorboard" in trackers.troubles()["tensorboard"]
    assert trackers.troubles() == {}, "it is said once"
    trackers.step(2, {"loss": 1.0})
    trackers.close(finished=True)


def test_wandb_has_one_run_over_attempts_whose_lines_grow_while_steps_go_back(tmp_path: Path) -> None:
    attempt(tmp_path, 1, [1, 2, 3, 4], tracker=wandb_of(tmp_path), begin=0)
    time.sleep(1.1)  # offline folders are named by the second
    attempt(tmp_path, 2, [3, 4, 5, 4, 5], tracker=wandb_of(tmp_path), begin=2)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    lines: list[dict[str, Any]] = []
    for file in files:
        records = records_of(file)
        (run,) = [record.run for record in records if record.HasField("run")]
        assert (run.run_id, run.project, run.display_name) == ("abc123", "tests", tmp_path.name)
        assert [record.metric.step_metric for record in records if record.metric.glob_name == "*"] == [
            "run/step"
        ]
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
        lines += history_of(file)
    trained = [(line["run/attempt"], line["run/step"]) for line in lines if "train/loss" in line]
    assert trained == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (2, 5), (2, 4), (2, 5)]
    assert [line["validation/top1"] for line in lines if "validation/top1" in line] == [1.004, 2.004, 2.004]
    numbers = [line["_step"] for line in lines]
    assert numbers == sorted(set(numbers)), "W&B drops what does not grow"


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.slow),
    ],
)
def test_a_wandb_that_is_gone_or_stuck_does_not_hold_up_training(
    tmp_path: Path, fault: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_tracker, "FINISH_SECONDS", -3.0)  # it adds 4
    tracker = wandb_of(tmp_path)
    trackers = Trackers([tracker], attempt=1, notes={})
    pid = tracker._process.pid
    os.kill(pid, fault)
    began = time.monotonic()
    told: dict[str, str] = {}
    for step in range(1, 30_001):
        trackers.step(step, {"loss": 1.0 / step, "grad_norm": 1.0, "lr": 1e-3, "images_per_second": 100.0})
        told.update(trackers.troubles())
    # What it does not take is kept up to a bound, then it is given up.
    assert time.monotonic() - began < 10.0
    assert told.keys() == {"wandb"}, told
    trackers.close(finished=True)
    assert time.monotonic() - began < 15.0
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_wandb_without_a_key_is_refused_at_a_runs_first_start_and_goes_on_offline_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match=r"API key.*metrics\.wandb\.mode=offline"):
        wandb_of(tmp_path, mode="online")
    tracker = wandb_of(tmp_path, mode="online", strict=False)
    assert "API key" in tracker.note
    attempt(tmp_path, 2, [1, 2], tracker=tracker, begin=0)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [line["run/step"] for line in history_of(file)] == [1, 2]


def test_a_package_that_is_missing_is_named_with_what_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"vit-pretrain\[wandb\]"):
        wandb_of(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"vit-pretrain\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    program = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from metrics.test_trackers import wandb_of\n"
        "tracker = wandb_of(Path(sys.argv[1]))\n"
        "tracker.log({'train/loss': 1.0}, step=1, redone=False)\n"
        "print(tracker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    deadline = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < deadline, "it outlives who started it"
        time.sleep(0.05)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert [line["run/step"] for line in history_of(file)] == [1], "what it was told is kept"
