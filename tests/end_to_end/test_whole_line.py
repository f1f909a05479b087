"""A folder of images to an exported backbone, damaged, extended, and carried on at another resolution."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from small_run import RECIPE, pretrain

from pretrain.checkpoint.manifest import committed
from pretrain.metrics.journal import read_journal


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that trains on a folder of images, validates on shards of other ones, and exports."""
    root = tmp_path_factory.mktemp("line")
    synth = ["data", "synth", "--image-size", "32", "--classes", "4", "--samples"]
    for step in (
        [*synth, "60", str(root / "images")],
        [*synth, "21", "--seed", "1", str(root / "others")],
        ["data", "pack", str(root / "others"), str(root / "val")],
    ):
        done = pretrain(*step)
        assert done.returncode == 0, done.stderr
    recipe = {
        **RECIPE,
        "run_dir": str(root / "run"),
        "data": {
            "train": str(root / "images"),
            "val": str(root / "val"),
            "workers": 0,
            "cache_dir": str(root / "cache"),
        },
        "train": {**RECIPE["train"], "steps": 4},
        "checkpoint": {"every_steps": 2, "keep_last": 5},
        "export": {"formats": ["timm"]},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = pretrain("train", str(root / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    assert "holds images, not shards: packing them into" in done.stderr
    return root


def exported(line: Path) -> dict:
    return json.loads((line / "run" / "exports" / "timm" / "export.json").read_text())


def events(run: Path, name: str) -> list[dict]:
    return [record for record in read_journal(run / "journal.jsonl") if record["event"] == name]


def test_a_folder_of_images_is_trained_on_validated_and_exported(line: Path) -> None:
    assert [r["step"] for r in events(line / "run", "step")] == [1, 2, 3, 4]
    (validation,) = events(line / "run", "validation")
    assert 0 <= validation["top1"] <= 1
    assert (validation["top1"] * 21) == pytest.approx(round(validation["top1"] * 21), abs=1e-4), (
        "of 21 images"
    )
    assert exported(line)["source"]["step"] == 4
    config = json.loads((line / "run" / "exports" / "timm" / "config.json").read_text())
    assert len(config["label_names"]) == 4


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_longer_run_exported_anew(line: Path) -> None:
    newest = committed(line / "run")[-1]
    file = newest / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)

    done = pretrain("train", str(line / "recipe.yaml"), "train.steps=6")
    assert done.returncode == 0, done.stderr
    (rejected,) = events(line / "run", "checkpoint_rejected")
    assert "rank-00000.safetensors" in rejected["reason"]
    assert "sha256" in rejected["reason"]
    assert events(line / "run", "start")[-1]["step"] == 2
    assert newest.with_name(f"{newest.name}.rejected").is_dir()
    assert [p.name for p in committed(line / "run")] == ["step-00000002", "step-00000004", "step-00000006"]
    assert exported(line)["source"]["step"] == 6


def test_another_run_pointed_at_the_folder_is_refused_with_a_diff(line: Path) -> None:
    for steps in ("6", "8"):  # finished, and to be gone on with
        done = pretrain("train", str(line / "recipe.yaml"), "seed=9", "model.depth=3", f"train.steps={steps}")
        assert done.returncode == 4
        assert "seed: 3 in the checkpoint, 9 now" in done.stderr
        assert "model.depth: 2 in the checkpoint, 3 now" in done.stderr


def test_an_export_goes_on_at_another_resolution_with_every_tensor_accounted_for(line: Path) -> None:
    source = str(line / "run" / "exports" / "timm")
    overrides = ["model.image_size=48", "train.steps=2", f"run_dir={line / 'tuned'}", "export.formats=[]"]
    done = pretrain("train", str(line / "recipe.yaml"), f"init_from={source}", *overrides)
    assert done.returncode == 0, done.stderr
    (init,) = events(line / "tuned", "init")
    assert "pos_embed" in init["report"]
    assert "resampled" in init["report"]
