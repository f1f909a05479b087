"""Images with any number of labels, from a manifest to a run that learns and is judged."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from small_run import RECIPE, losses, pretrain

from pretrain.metrics.journal import read_journal

SAMPLES = 48


def test_any_number_of_labels_an_image_is_learned_with_a_sigmoid_and_refused_by_a_softmax(
    tmp_path: Path,
) -> None:
    images, shards = tmp_path / "images", tmp_path / "shards"
    made = pretrain("data", "synth", str(images), "--samples", str(SAMPLES), "--image-size", "32")
    assert made.returncode == 0, made.stderr
    files = sorted(path.relative_to(images) for path in images.rglob("*.*g") if path.is_file())
    rows = [f"{file},{'|'.join(str(k) for k in range(i % 4)) or '|'}" for i, file in enumerate(files)]
    (images / "m.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    packed = pretrain("data", "pack", str(images / "m.csv"), str(shards), "--chunk-samples", "16")
    assert packed.returncode == 0, packed.stderr

    recipe = tmp_path / "recipe.yaml"
    data = {**RECIPE["data"], "train": str(shards), "val": str(shards), "mixup": 0.5}
    told = {**RECIPE, "run_dir": str(tmp_path / "run"), "data": data, "objective": {"loss": "sigmoid"}}
    recipe.write_text(yaml.safe_dump(told))
    refused = pretrain("train", str(recipe), "--dry-run", "objective.loss=softmax")
    assert refused.returncode == 2
    assert "take objective.loss=sigmoid" in refused.stderr

    trained = pretrain("train", str(recipe), "optim.lr=1e-2", "train.steps=16")
    assert trained.returncode == 0, trained.stderr
    curve = losses(tmp_path / "run")
    assert 0 < curve[16] < curve[1]
    records = read_journal(tmp_path / "run" / "journal.jsonl")
    steps = [record for record in records if record["event"] == "step"]
    assert all(0 <= record["precision_at_1"] <= 1 for record in steps)
    (judged,) = [record for record in records if record["event"] == "validation"]
    assert 0 < judged["ranking_precision"] <= 1

    replayed = pretrain("replay", str(tmp_path / "run"), "--step", "3", "--out", str(tmp_path / "replay"))
    assert replayed.returncode == 0, replayed.stderr
    samples = json.loads((tmp_path / "replay" / "replay.json").read_text())["samples"]
    sets = {str(file.with_suffix("")): list(range(i % 4)) for i, file in enumerate(files)}
    assert {sample["key"]: sample["label"] for sample in samples} == {
        sample["key"]: sets[sample["key"]] for sample in samples
    }
