"""A run that keeps an average of its weights, warms its head first and decays by layer: validated, resumed, read."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from small_run import pretrain

from pretrain.assemble import build_objective
from pretrain.checkpoint.load import CheckpointReader, load_weights
from pretrain.checkpoint.manifest import committed
from pretrain.config.load import load_config
from pretrain.formats.incoming import read_backbone
from pretrain.metrics.journal import read_journal

OPTIM = {
    "base_lr": 2e-2,
    "schedule": "wsd",
    "cooldown_steps": 2,
    "layer_decay": 0.8,
    "head_lr_scale": 2.0,
    "freeze_backbone_steps": 2,
    "ema_decay": 0.8,
    "ema_warmup": True,
}


def state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    reader = CheckpointReader(folder)
    kinds = sorted({(p.parameter, p.kind) for slices in reader.manifest.files.values() for p in slices})
    sizes = {name: torch.Size(shape).numel() for name, shape in reader.manifest.parameters.items()}
    return {
        (name, kind): torch.cat([values for _, values in reader.pieces(name, kind, 0, sizes[name])])
        for name, kind in kinds
    }


def test_a_run_with_an_average_validates_it_resumes_it_bitwise_and_gives_it_to_readers(
    recipe: Path, shards: Path, tmp_path: Path
) -> None:
    told = yaml.safe_load(recipe.read_text())
    told["optim"], told["eval"] = OPTIM, {"every_steps": 4}
    told["data"]["val"] = str(shards)
    told["train"]["steps"], told["checkpoint"] = 6, {"every_steps": 2, "keep_last": 10}
    recipe.write_text(yaml.safe_dump(told))
    run = tmp_path / "run"
    done = pretrain("train", str(recipe), "--debug")
    assert done.returncode == 0, done.stderr

    judged = [record for record in read_journal(run / "journal.jsonl") if record["event"] == "validation"]
    assert [record["step"] for record in judged] == [4, 6]
    assert all(record["ema_loss"] != record["loss"] and 0 <= record["ema_top1"] <= 1 for record in judged)

    # The head learned alone at first: the backbone is the one that the seed makes, and so is its average.
    fresh = dict(build_objective(load_config(recipe), num_classes=6).named_parameters())
    for kind in ("weight", "ema"):
        for name, weight in load_weights(committed(run)[0], kind=kind).items():
            assert torch.equal(weight, fresh[name]) == name.startswith("backbone."), name
    assert not torch.equal(load_weights(committed(run)[1])["backbone.cls_token"], fresh["backbone.cls_token"])

    shutil.copytree(run, tmp_path / "whole")
    for folder in committed(run)[1:]:
        shutil.rmtree(folder)
    (run / "finished.json").unlink()
    again = pretrain("train", str(recipe), "--debug")
    assert again.returncode == 0, again.stderr
    resumed, expected = state(committed(run)[-1]), state(committed(tmp_path / "whole")[-1])
    assert {kind for _, kind in expected} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], values) for key, values in expected.items())

    by_default, raw = read_backbone(run), read_backbone(run, weights="raw")
    assert torch.equal(by_default.backbone["cls_token"].flatten(), expected["backbone.cls_token", "ema"])
    assert torch.equal(raw.backbone["cls_token"].flatten(), expected["backbone.cls_token", "weight"])
    assert not torch.equal(raw.backbone["cls_token"], by_default.backbone["cls_token"])
