from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from services.required import skip_or_fail
from services.ssh_hosts import Hosts, unavailable
from small_run import RECIPE, pretrain


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


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Three of them, h0 to h2, with sshd and a file system that they share."""
    if reason := unavailable():
        skip_or_fail(reason)
    folder = tmp_path / "hosts"
    folder.mkdir()
    with Hosts(folder, 3) as made:
        yield made
