"""Small image folders and a way to run commands as a user does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
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
