"""A run that is killed and started again is one run in TensorBoard and in W&B, with each step once or told apart."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from metrics.tracker_files import history_of, scalars
from small_run import losses, pretrain
from test_interruption import running, session, steps_in, until

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_the_same_run_in_its_trackers_and_leaves_no_process(
    recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    asked = [
        *("train", str(recipe), "data.workers=0", "checkpoint.every_steps=8", "train.steps=100000"),
        *("metrics.tensorboard=true", "metrics.wandb={project: tests, mode: offline}"),
    ]
    with session(asked, tmp_path / "log") as train:
        train.wait_for(lambda: steps_in(run_dir) >= 30, "step 30")
        os.kill(train.process.pid, signal.SIGKILL)
        train.process.wait()
        # W&B's processes end by themselves, once they have written what they were told.
        until(lambda: not running(train.mark), "the end of all that it started")
    saved = int(max((run_dir / "checkpoints").glob("step-*[0-9]")).name.removeprefix("step-"))
    known = json.loads((run_dir / "tracking.json").read_text())["run_id"]

    asked[4] = f"train.steps={saved + 6}"
    done = pretrain(*asked)
    assert done.returncode == 0, done.stderr
    assert "tracker_failed" not in (run_dir / "journal.jsonl").read_text()

    shown = scalars(run_dir / "tensorboard", "train/loss")
    assert [step for step, _ in shown] == list(range(1, saved + 7)), (
        "what came after the checkpoint is given up"
    )
    expected = losses(run_dir)
    assert [value for _, value in shown] == pytest.approx([expected[step] for step, _ in shown], rel=1e-6)

    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert [folder.name.rpartition("-")[2] for folder in folders] == [known, known]
    lines = [line for folder in folders for line in history_of(folder / f"run-{known}.wandb")]
    trained = {
        (line["run/attempt"], line["run/step"]): line["train/loss"] for line in lines if "train/loss" in line
    }
    assert [trained[2, step] for step in range(saved + 1, saved + 7)] == pytest.approx(
        [expected[step] for step in range(saved + 1, saved + 7)]
    )
    numbers = [line["_step"] for line in lines]
    assert numbers == sorted(set(numbers))
