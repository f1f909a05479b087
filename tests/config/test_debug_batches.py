"""How many images a step of `pretrain train … --debug` has."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pretrain import recipe
from pretrain.config.schema import RunConfig


def resolved(folder: Path, *words: str, batch_size: int = 4096, **train: int) -> RunConfig:
    path = folder / "recipe.yaml"
    sections = {
        "run_dir": str(folder / "run"),
        "model": {"size": "tiny"},
        "data": {"train": "SHARDS"},
        "train": {"global_batch_size": batch_size, "steps": 10, **train},
    }
    path.write_text(yaml.safe_dump(sections))
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    config = recipe.resolve(parser.parse_intermixed_args([str(path), *words]))
    assert config is not None
    return config


def test_a_large_batch_becomes_32_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolved(tmp_path, "--debug", micro_batch_size=512)
    assert config.train.global_batch_size == 32
    assert config.train.micro_batch_size == 512, "of a smaller batch, at most all is computed at once"
    told = capsys.readouterr().err
    assert told == "--debug: 32 images a step; train.global_batch_size=4096 keeps the recipe's\n"


@pytest.mark.parametrize(
    ("words", "batch_size", "left"),
    [
        (["--debug"], 16, 16),
        (["--debug"], 32, 32),
        ([], 4096, 4096),
        (["--debug", "train.global_batch_size=256"], 4096, 256),
        (["--debug", "train.global_batch_size=4096"], 4096, 4096),
        (["--debug", "train={global_batch_size: 64, steps: 1}"], 4096, 64),
    ],
)
def test_a_small_batch_stays_and_so_does_one_that_somebody_has_asked_for(
    tmp_path: Path, words: list[str], batch_size: int, left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolved(tmp_path, *words, batch_size=batch_size).train.global_batch_size == left
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("began_with", "left"), [(32, 32), (4096, 4096)])
def test_a_run_goes_on_with_steps_as_it_had_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began_with: int, left: int
) -> None:
    manifest = SimpleNamespace(config={"train": {"global_batch_size": began_with}})
    monkeypatch.setattr(recipe, "newest_manifest", lambda run_dir: manifest)
    assert resolved(tmp_path, "--debug").train.global_batch_size == left
