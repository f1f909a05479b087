"""Whole runs whose numbers go wrong, against runs that were told beforehand what to jump over."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, clean_environment, run_ranks
from small_run import losses
from test_resume import stage, state, write_recipe

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.checkpoint.skipped import Skipped, read_skipped, write_skipped
from pretrain.metrics.journal import read_journal

DRIVER = Path(__file__).with_name("wrong_numbers.py")
B, STEPS = 16, 12
# Judged from the fifth loss on; a spike's batch and the one before it are left out.
SPIKE = {"window_steps": 4, "threshold": 10.0, "skip_steps": 2}
TRAIN = {"steps": STEPS, "spike": SPIKE, "max_nonfinite_steps": 1}
AT_STEP_8 = {"factor": 10, "from": 7 * B, "to": 8 * B}
SKIPPED = [(6 * B, 8 * B)]


def alone(recipe: Path, *wrong: dict[str, Any], expect: int = 0) -> str:
    """Run in one process; what it said."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(recipe)],
        env=clean_environment(WRONG=json.dumps(wrong)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stderr


def told_beforehand(run_dir: Path, intervals: list[tuple[int, int]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_skipped(
        run_dir, [Skipped(start=a, stop=b, reason="told", attempt=0, time=0.0) for a, b in intervals]
    )


def same_state(run: Path, reference: Path) -> None:
    expected, got = state(find_newest(reference)), state(find_newest(run))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(run_dir / "journal.jsonl") if record["event"] == name]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """One process that never sees the spike's samples."""
    root = tmp_path_factory.mktemp("reference")
    told_beforehand(root / "run", SKIPPED)
    alone(write_recipe(root / "recipe.yaml", root / "run", shards, train=TRAIN))
    return root / "run"


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"every_steps": 3, "keep_last": 10},
        {"every_steps": 1, "keep_last": 1},  # which has seen samples that are skipped
    ],
)
def test_a_loss_spike_leads_back_to_before_it_and_on_without_its_samples(
    tmp_path: Path, shards: Path, reference: Path, checkpoint: dict[str, int]
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, shards, train=TRAIN, checkpoint=checkpoint)
    said = alone(recipe, AT_STEP_8)
    assert "deviations above" in said
    (rollback,) = events(run_dir, "rollback")
    assert (rollback["kind"], rollback["from_step"], rollback["step"]) == ("spike", 8, 6)
    assert [(one.start, one.stop) for one in read_skipped(run_dir)] == SKIPPED
    assert losses(run_dir) == losses(reference)
    same_state(run_dir, reference)
    manifest = read_manifest(find_newest(run_dir))
    assert (manifest.step, manifest.samples) == (STEPS, STEPS * B + 2 * B)
    assert [(one["start"], one["stop"]) for one in manifest.skipped] == SKIPPED
    for folder in committed(run_dir):  # whatever was saved of the other course is gone
        older = read_manifest(folder)
        assert older.samples <= 6 * B or older.skipped == manifest.skipped


def test_killed_between_the_commit_and_going_back_it_goes_on_as_if_it_had_gone_back(
    tmp_path: Path, shards: Path, reference: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run_dir,
        shards,
        train=TRAIN,
        checkpoint={"every_steps": 1, "keep_last": 20},
    )
    alone(recipe, AT_STEP_8, {"die": True}, expect=-signal.SIGKILL)
    assert [read_manifest(folder).step for folder in committed(run_dir)] == list(range(1, 8))
    assert [(one.start, one.stop) for one in read_skipped(run_dir)] == SKIPPED
    alone(recipe)
    assert events(run_dir, "start")[-1]["step"] == 6, "step 7 has consumed what is skipped"
    assert {step: loss for step, loss in losses(run_dir).items() if step > 6} == {
        step: loss for step, loss in losses(reference).items() if step > 6
    }
    same_state(run_dir, reference)


@pytest.mark.slow
@pytest.mark.timeout(900)  # launches on a busy machine
def test_steps_that_are_never_finite_are_left_out_then_gone_back_from_then_skipped(
    tmp_path: Path, shards: Path, reference: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, shards, train=TRAIN)
    said = alone(recipe, {"factor": "nan", "from": 6 * B, "to": 8 * B})
    assert "the update is left out on all ranks" in said
    assert [
        (record["kind"], record["from_step"], record["step"], record["skipped"])
        for record in events(run_dir, "rollback")
    ] == [("non-finite", 8, 6, []), ("non-finite", 8, 6, [list(SKIPPED[0])])]
    assert [record["step"] for record in events(run_dir, "step_skipped")] == [7, 8, 7, 8]
    same_state(run_dir, reference)


@pytest.mark.slow
@pytest.mark.timeout(900)  # launches on a busy machine
def test_without_a_checkpoint_to_go_back_to_it_ends_and_begins_anew_without_those_samples(
    tmp_path: Path, shards: Path, reference: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml", run_dir, shards, train=TRAIN, checkpoint={"every_steps": 100}
    )
    said = alone(recipe, AT_STEP_8, expect=1)
    assert "no checkpoint from before it" in said
    alone(recipe)
    assert losses(run_dir) == losses(reference)
    same_state(run_dir, reference)


@pytest.mark.slow
@pytest.mark.timeout(900)  # launches on a busy machine
@pytest.mark.parametrize(("world_size", "zero_stage"), [(2, 1), (3, 3)])
def test_ranks_go_back_together_from_a_spike_that_one_of_them_had(
    tmp_path: Path, shards: Path, world_size: int, zero_stage: int
) -> None:
    runs = {}
    for name, wrong in (("struck", [{**AT_STEP_8, "factor": 60, "rank": 1}]), ("told", [])):
        (tmp_path / name).mkdir()
        runs[name] = tmp_path / name / "run"
        if name == "told":
            told_beforehand(runs[name], SKIPPED)
        recipe = write_recipe(
            tmp_path / name / "recipe.yaml", runs[name], shards, train=TRAIN, deepspeed=stage(zero_stage)
        )
        extra = {"WRONG": json.dumps(wrong)}
        run_ranks(
            world_size, [str(DRIVER), str(recipe)], timeout_seconds=500, folder=tmp_path / name, extra=extra
        )
    assert len(events(runs["struck"], "rollback")) == 1
    assert losses(runs["struck"]) == losses(runs["told"])
    same_state(runs["struck"], runs["told"])


@pytest.mark.slow
@pytest.mark.timeout(900)  # launches on a busy machine
@pytest.mark.parametrize(
    ("world_size", "zero_stage", "precision"), [(3, 1, "bf16"), (2, 2, "bf16"), (3, 0, "float32")]
)
def test_a_flipped_bit_of_one_ranks_weights_is_found_before_it_is_used_and_the_rank_named(
    tmp_path: Path, shards: Path, world_size: int, zero_stage: int, precision: str
) -> None:
    runs = {}
    flip = {"flip": "blocks.1.mlp.fc1.weight", "rank": world_size - 1, "step": 8}
    for name, wrong in (("flipped", [flip]), ("sound", [])):
        (tmp_path / name).mkdir()
        runs[name] = tmp_path / name / "run"
        recipe = write_recipe(
            tmp_path / name / "recipe.yaml",
            runs[name],
            shards,
            train={
                "steps": STEPS,
                "precision": precision,
                "replica_check_steps": 1,
                "micro_batch_size": None if (zero_stage, precision) == (0, "bf16") else 4,
            },
            deepspeed=stage(zero_stage),
        )
        extra = {"WRONG": json.dumps(wrong)}
        run_ranks(
            world_size, [str(DRIVER), str(recipe)], timeout_seconds=500, folder=tmp_path / name, extra=extra
        )
    (rollback,) = events(runs["flipped"], "rollback")
    assert (rollback["kind"], rollback["from_step"], rollback["step"]) == ("replica", 8, 6)
    assert f"rank {world_size - 1} on " in rollback["reason"]
    assert "blocks.1.mlp.fc1.weight" in rollback["reason"]
    assert "rank 0 on" not in rollback["reason"]
    assert not events(runs["sound"], "rollback")
    assert losses(runs["flipped"]) == losses(runs["sound"])
    same_state(runs["flipped"], runs["sound"])


def test_a_run_that_may_not_go_back_again_leaves_no_checkpoint_that_the_fault_may_be_in(
    tmp_path: Path, shards: Path
) -> None:
    """It ends with 1 and is started again: not from weights that nobody trusts."""
    run_dir = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run_dir,
        shards,
        train={"steps": STEPS, "precision": "float32", "replica_check_steps": 4, "max_rollbacks": 0},
        checkpoint={"every_steps": 1, "keep_last": 20},
        deepspeed=stage(0),
    )
    flip = {"flip": "blocks.1.mlp.fc1.weight", "rank": 1, "step": 8}
    extra = {"WRONG": json.dumps([flip])}
    run_ranks(2, [str(DRIVER), str(recipe)], timeout_seconds=200, folder=tmp_path, extra=extra, expect=1)
    assert [read_manifest(folder).step for folder in committed(run_dir)] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(900)  # launches on a busy machine
def test_killed_before_untrusted_checkpoints_are_removed_it_does_not_begin_from_them(
    tmp_path: Path, shards: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run_dir,
        shards,
        train={"steps": STEPS, "precision": "float32", "replica_check_steps": 4},
        checkpoint={"every_steps": 1, "keep_last": 20},
        deepspeed=stage(0),
    )
    flip = {"flip": "blocks.1.mlp.fc1.weight", "rank": 1, "step": 8}
    extra = {"WRONG": json.dumps([flip, {"die": True}])}
    run_ranks(2, [str(DRIVER), str(recipe)], timeout_seconds=200, folder=tmp_path, extra=extra, expect=None)
    assert [read_manifest(folder).step for folder in committed(run_dir)][:7] == [1, 2, 3, 4, 5, 6, 7]
    assert read_manifest(find_newest(run_dir)).step == 4
    run_ranks(2, [str(DRIVER), str(recipe)], timeout_seconds=200, folder=tmp_path)
    assert events(run_dir, "start")[-1]["step"] == 4
    assert read_manifest(find_newest(run_dir)).step == STEPS
