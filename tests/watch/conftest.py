from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import ROOT, clean_environment
from watched_runs import Launch


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for step in (
        ["synth", str(root / "images"), "--samples", "64", "--image-size", "32", "--classes", "4"],
        ["pack", str(root / "images"), str(root / "shards"), "--chunk-samples", "16"],
    ):
        command = [sys.executable, "-m", "pretrain.cli", "data", *step]
        subprocess.run(command, check=True, capture_output=True, env=clean_environment(), cwd=ROOT)
    return root / "shards"


@pytest.fixture
def launch(tmp_path: Path, shards: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(command: list[str], **options) -> Launch:
        started.append(Launch(tmp_path, shards, command, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()
