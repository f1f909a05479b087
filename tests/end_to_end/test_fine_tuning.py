"""A run that trains a part of its network on a part of its data, and stops when validation gets no better."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from small_run import pretrain

from pretrain.assemble import build_objective
from pretrain.checkpoint.best import BEST_NAME
from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.config.load import load_config
from pretrain.metrics.journal import read_journal


def test_the_last_block_learns_from_a_fraction_until_validation_is_stuck_and_the_best_stays(
    recipe: Path, shards: Path, tmp_path: Path
) -> None:
    told = yaml.safe_load(recipe.read_text())
    told["data"] |= {"val": str(shards), "train_fraction": 0.5}
    told["optim"] = {"lr": 1e-2, "train_last_blocks": 1, "layer_decay": 0.9}
    told["train"] |= {"steps": 50, "early_stopping": {"metric": "top1", "patience": 2, "min_delta": 1.0}}
    told["eval"], told["checkpoint"] = (
        {"every_steps": 2},
        {"every_steps": 100, "keep_last": 1, "keep_best": "loss"},
    )
    recipe.write_text(yaml.safe_dump(told))
    run = tmp_path / "run"
    done = pretrain("train", str(recipe), "--debug")
    assert done.returncode == 0, done.stderr

    # By more than min_delta nothing can be better than the first of the validations in steps 2, 4 and 6.
    lines = read_journal(run / "journal.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "validation"}
    assert list(losses) == [2, 4, 6]
    assert [line["step"] for line in lines if line["event"] == "stopped_early"] == [6]
    assert json.loads((run / "finished.json").read_text())["stopped_early"] is True
    best = min(losses, key=lambda step: losses[step])
    assert json.loads((run / BEST_NAME).read_text())["step"] == best
    assert [read_manifest(folder).step for folder in committed(run)] == sorted({best, 6})

    newest = committed(run)[-1]
    order = read_manifest(newest).order
    assert order["num_samples"] == 75
    assert len(order["selected"]) == 64
    fresh = dict(build_objective(load_config(recipe), num_classes=6).named_parameters())
    trained = ("backbone.blocks.1.", "backbone.norm.", "head.")
    for name, weight in load_weights(newest).items():
        assert torch.equal(weight, fresh[name]) != name.startswith(trained), name

    again = pretrain("train", str(recipe), "--debug")
    assert again.returncode == 0, again.stderr
    assert "is finished at step 6" in again.stdout
