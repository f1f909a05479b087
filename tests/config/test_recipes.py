"""What recipes say of themselves, held against the models that the project has of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.cost import GPU_FLOPS, cost_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))


def header(path: Path) -> str:
    lines = (line for line in path.read_text().splitlines() if line.startswith("#"))
    return " ".join(line.lstrip("#").strip() for line in lines)


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipes_cost_is_that_of_the_model(path: Path) -> None:
    said = re.search(r"([\d,.]+) GFLOP a training image", header(path))
    if said is None:
        assert "cost:     under a minute" in path.read_text()
        return
    config = load_config(path)
    gflop = cost_of(config, config.objective.num_classes or 1000).training_flops / 1e9
    if config.objective.num_classes is None and gflop < 1:
        # a small network's head counts, and is not known here
        gflop = cost_of(config, None).training_flops / 1e9
        assert number(said[1]) == pytest.approx(gflop, rel=0.1)
    else:
        assert number(said[1]) == pytest.approx(gflop, rel=0.01)
    run = re.search(r"([\d,]+) images: ([\d.e+]+) FLOP, ([\d,.]+) GPU hours at (\d+) TFLOP/s", header(path))
    if run is None:
        return
    images, flops, hours, rate = map(number, run.groups())
    assert rate * 1e12 == GPU_FLOPS
    assert flops == pytest.approx(images * gflop * 1e9, rel=0.03)
    assert hours == pytest.approx(images * gflop * 1e9 / GPU_FLOPS / 3600, rel=0.01)
    if config.train.epochs is not None:
        assert images % config.train.epochs == 0, "whole epochs of a dataset"
    else:
        assert images == (config.train.steps or 0) * config.train.global_batch_size


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipes_command_names_it(path: Path) -> None:
    named = str(path.relative_to(CONFIGS.parent))
    assert named in header(path) or path.parent.name == "demo", f"{path} is not in its own command"


def test_every_recipe_that_has_a_papers_result_is_in_the_readmes_table() -> None:
    readme = (CONFIGS.parent / "README.md").read_text()
    for path in PATHS:
        if "(the paper:" in header(path):
            name = path.relative_to(CONFIGS).with_suffix("")
            assert f"`{name}`" in readme, f"README.md's table lacks {name}"
