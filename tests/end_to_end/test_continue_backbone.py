"""configs/starter/continue_backbone.yaml from a folder of timm's, made small: the trunk waits for the head, and a
continuation that ruins the features is told of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT
from PIL import Image
from small_run import train

from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.cli import main
from pretrain.formats.incoming import read_backbone
from pretrain.formats.timm import write_timm
from pretrain.metrics.journal import read_journal
from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec

RECIPE = ROOT / "configs/starter/continue_backbone.yaml"
SPEC = BackboneSpec(
    image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
SMALL = (
    "model={embed_dim: 24, depth: 2, num_heads: 2, patch_size: 8, image_size: 32, drop_path_rate: 0.1}",
    "train={global_batch_size: 16, micro_batch_size: 8, steps: 4, precision: float32}",
    "optim.freeze_backbone_steps=2",
    "optim.warmup_steps=3",
    "eval.every_steps=2",
    "eval.probes.every_steps=1",
    "checkpoint={every_steps: 1, keep_last: 4}",
    "data.workers=0",
    "export.formats=[]",
)


def pack_tints(out: Path, *, per_class: int, seed: int) -> str:
    """Grey noise, tinted a little by class: a network that was never trained tells most of them apart."""
    rng = np.random.default_rng(seed)
    tints = 24 * np.concatenate([np.eye(3), -np.eye(3)])
    for label, tint in enumerate(tints):
        folder = out / "images" / f"tint-{label}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.normal(128 + tint, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{seed}-{i}.png")
    assert main(["data", "pack", str(out / "images"), str(out / "shards")]) == 0
    return str(out / "shards")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What the recipe is started with, but for run_dir: a folder of timm's, and images to continue on."""
    root = tmp_path_factory.mktemp("continued")
    torch.manual_seed(0)
    (root / "timm").mkdir()
    write_timm(root / "timm", build_backbone(SPEC).state_dict(), SPEC)
    train_shards = pack_tints(root / "train", per_class=25, seed=1)
    val_shards = pack_tints(root / "val", per_class=40, seed=2)
    return (f"init_from={root / 'timm'}", f"data.train={train_shards}", f"data.val={val_shards}", *SMALL)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(run_dir / "journal.jsonl") if record["event"] == kind]


def test_the_trunk_is_frozen_while_the_head_warms_up_and_is_probed_from_step_0_on(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(RECIPE, *words, f"run_dir={run}") == 0
    probes = events(run, "probe")
    assert [(r["step"], r["probe"]) for r in probes] == [
        (step, name) for step in range(5) for name in ("knn", "few_shot_5")
    ]
    for name in ("knn", "few_shot_5"):
        at = {r["step"]: r["top1"] for r in probes if r["probe"] == name}
        assert at[0] == at[1] == at[2], "of the same features"
        assert at[0] > 0.7, "6 classes, so that there is something to lose"
    assert events(run, "probe_falls") == []

    weights = {read_manifest(folder).step: load_weights(folder) for folder in committed(run)}
    assert sorted(weights) == [1, 2, 3, 4]
    backbone = read_backbone(words[0].removeprefix("init_from=")).backbone
    for step in (1, 2):
        for name, value in backbone.items():
            assert torch.equal(weights[step][f"backbone.{name}"], value), (step, name)
    matrices = [name for name, value in backbone.items() if value.ndim > 1]
    assert len(matrices) > 8
    for name in matrices:
        assert not torch.equal(weights[3][f"backbone.{name}"], backbone[name]), name
    assert not torch.equal(weights[2]["head.weight"], weights[1]["head.weight"])


def test_features_that_a_rate_far_too_high_ruins_are_told_of(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(RECIPE, *words, f"run_dir={run}", "optim.lr=100") == 0
    falls = [fall for fall in events(run, "probe_falls") if fall["below"] == "start"]
    assert falls
    for fall in falls:
        assert fall["step"] in (3, 4), "not before the trunk moves"
        assert fall["reference_step"] == 0
        assert fall["top1"] < fall["reference"] - fall["margin"]
    said = capsys.readouterr()
    assert "the features get worse: the " in said.out + said.err
    assert "points below where the run began" in said.out + said.err
