"""A self-distillation objective of one file, with a teacher, through train.py: resumed, replayed, exported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, clean_environment, run_ranks
from small_run import losses
from test_averaged_run import state
from test_resume import stage, write_recipe

from pretrain.checkpoint.manifest import committed
from pretrain.formats.incoming import read_backbone
from pretrain.metrics.journal import read_journal, steps_of

DRIVER = Path(__file__).with_name("train_self_distillation.py")
IMPORTABLE = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
AVERAGED = {"ema_decay": 0.8, "lr": 1e-3, "warmup_steps": 2}


def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DRIVER), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment(**IMPORTABLE),
        cwd=ROOT,
    )


def recipe_of(folder: Path, shards: Path, **sections: dict) -> Path:
    # a recipe has to name an objective: one that needs no labels either
    common = {"objective": {"name": "simmim", "mask_patch_size": 8}, "optim": AVERAGED, "train": {"steps": 6}}
    return write_recipe(folder / "recipe.yaml", folder / "run", shards, **common, **sections)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Six steps in one process, a checkpoint after the third and the last."""
    root = tmp_path_factory.mktemp("distilled")
    done = pretrain("train", str(recipe_of(root, shards, export={"formats": ["timm"]})))
    assert done.returncode == 0, done.stderr
    return root / "run"


def half_of(whole: Path, folder: Path) -> None:
    first = committed(whole)[0]
    shutil.copytree(first, folder / "run" / "checkpoints" / first.name)


def test_a_resumed_run_with_a_teacher_is_bitwise_the_run_that_was_not_stopped(
    whole: Path, shards: Path, tmp_path: Path
) -> None:
    half_of(whole, tmp_path)
    done = pretrain("train", str(recipe_of(tmp_path, shards)))
    assert done.returncode == 0, done.stderr
    expected = {step: loss for step, loss in losses(whole).items() if step > 3}
    assert len(set(expected.values())) == 3
    assert losses(tmp_path / "run") == expected
    before, after = state(committed(whole)[-1]), state(committed(tmp_path / "run")[-1])
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], values) for key, values in before.items())


@pytest.mark.slow
def test_so_is_one_resumed_on_two_ranks_within_1e_5(whole: Path, shards: Path, tmp_path: Path) -> None:
    half_of(whole, tmp_path)
    recipe = recipe_of(tmp_path, shards, deepspeed=stage(2))
    run_ranks(2, [str(DRIVER), "train", str(recipe)], timeout_seconds=150, folder=tmp_path, extra=IMPORTABLE)
    expected = {step: loss for step, loss in losses(whole).items() if step > 3}
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


def test_a_replayed_step_has_the_teacher_of_its_checkpoint(whole: Path, tmp_path: Path) -> None:
    done = pretrain("replay", str(whole), "--step", "4", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    journalled = steps_of(read_journal(whole / "journal.jsonl"))[4]
    got = json.loads((tmp_path / "replay.json").read_text())
    assert got["weights_step"] == 3
    assert got["loss"] == pytest.approx(journalled["loss"], rel=1e-6)
    assert got["grad_norm"] == pytest.approx(journalled["grad_norm"], rel=1e-5)
    assert not any("teacher" in layer for layer in got["layers"])


def test_checkpoints_and_exports_hold_nothing_of_the_teacher(whole: Path) -> None:
    names = {name for name, _ in state(committed(whole)[-1])}
    assert {"backbone.cls_token", "head.weight"} <= names
    assert not any("teacher" in name for name in names)
    exported = read_backbone(whole / "exports" / "timm")
    assert not any("teacher" in name for name in exported.backbone)
    average = state(committed(whole)[-1])["backbone.cls_token", "ema"]
    assert torch.equal(exported.backbone["cls_token"].flatten(), average)


def test_a_recipe_without_an_average_is_refused_before_the_first_step(shards: Path, tmp_path: Path) -> None:
    done = pretrain("train", str(recipe_of(tmp_path, shards)), "optim.ema_decay=null")
    assert done.returncode == 2
    assert "optim.ema_decay" in done.stderr
