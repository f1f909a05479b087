from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment

RECIPE = {
    "seed": 3,
    "model": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "drop_path_rate": 0.1,
    },
    "data": {"workers": 1, "color_jitter": 0.2},
    "train": {"global_batch_size": 16, "micro_batch_size": 4, "steps": 12, "precision": "float32"},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every_steps": 3, "keep_last": 10},
}


def pretrain(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_environment(**environment),
        cwd=ROOT,
    )


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 synthetic images of 6 classes in small chunks, packed by the project's own commands."""
    root = tmp_path_factory.mktemp("data")
    for step in (
        ["data", "synth", str(root / "images"), "--samples", "150", "--image-size", "32", "--classes", "6"],
        ["data", "pack", str(root / "images"), str(root / "shards"), "--chunk-samples", "16"],
    ):
        done = pretrain(*step)
        assert done.returncode == 0, done.stderr
    return root / "shards"


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    """A recipe whose run_dir is tmp_path/run."""
    path = tmp_path / "recipe.yaml"
    data = {**RECIPE["data"], "train": str(shards)}
    path.write_text(yaml.safe_dump({**RECIPE, "run_dir": str(tmp_path / "run"), "data": data}))
    return path
