"""Small image folders, runs that stopped, and a way to run commands as a user does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data.tiny_shards import write_dataset
from run_folders import STEP, Run
from small_images import image_bytes

from pretrain.cli import main

MakeFolder = Callable[..., Path]
Command = Callable[..., int]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Makes an image folder of three classes, `per_class` images each."""

    def make(
        per_class: int = 20, *, name: str = "images", classes: tuple[str, ...] = ("bee", "ant", "cat")
    ) -> Path:
        for c, folder in enumerate(classes):
            (tmp_path / name / folder).mkdir(parents=True)
            for i in range(per_class):
                (tmp_path / name / folder / f"{i:03d}.png").write_bytes(image_bytes(1000 * c + i))
        return tmp_path / name

    return make


@pytest.fixture
def pretrain() -> Command:
    """Runs `pretrain WORDS…` in this process and gives its exit code."""
    return lambda *words: main([str(word) for word in words])


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root / "a", count=75)
    write_dataset(root / "b", count=43, image=lambda i: str(i).encode())
    write_dataset(root / "unlabelled", count=20, labels=False)
    return {name: str(root / name) for name in ("a", "b", "unlabelled")}


@pytest.fixture
def start_run(tmp_path: Path, datasets: dict[str, str]) -> Callable[[], Run]:
    def start() -> Run:
        run = Run(tmp_path / "run", datasets["a"])
        run.train(0, STEP + 2, saved=STEP)  # killed two steps after its checkpoint
        return run

    return start
