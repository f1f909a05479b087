"""What --debug, --profile and --overfit-one-batch do, without a run around them."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pretrain.config.schema import RunConfig
from pretrain.data.augment import DeviceTransform
from pretrain.debugging import Asked, Debugging, StepProfile
from pretrain.distributed import World
from pretrain.errors import PretrainError, UsageError
from pretrain.steps import preparing

CPU = torch.device("cpu")
ALONE = World(rank=0, local_rank=0, world_size=1, device=CPU, launched=False)


def debugging(run_dir: Path, **asked: Any) -> Debugging:
    config = RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32},
            "data": {"train": "nowhere"},
            "train": {"global_batch_size": 4, "steps": 1},
        }
    )
    return Debugging(Asked(**asked), config, world=ALONE, class_names=["apple", "pear"])


def batch_of(number: int) -> Any:
    pixels = torch.full((2, 3, 32, 32), number, dtype=torch.uint8)
    return {
        "images": pixels,
        "labels": torch.tensor([1, -1]),
        "weights": torch.ones(2),
        "positions": torch.tensor([7, 8]),
        "draws": torch.zeros(2, 12),
    }


def steps() -> Generator[list[Any], None, None]:
    """As the loader's: the memory of a batch is used again for the next, and after the last."""
    batch = batch_of(0)
    try:
        for number in range(1, 100):
            batch["images"].fill_(number)
            yield [batch]
    finally:
        batch["images"].fill_(255)


def test_the_first_batch_is_drawn_as_the_network_sees_it_and_three_are_described(tmp_path, capsys):
    aids = debugging(tmp_path, debug=True)
    transform = DeviceTransform(
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        horizontal_flip=False,
        color_jitter=0.0,
        three_augment=False,
        erases=False,
    )
    prepared = preparing(CPU, transform, None)
    for number in (40, 50, 60, 70):
        aids.show([batch_of(number)], prepared)
    sheet = Image.open(tmp_path / "debug" / "first_batch.png").convert("RGB")
    colors = {color: count for count, color in sheet.getcolors(1 << 16)}
    # A little more: letters' edges are grey, too.
    assert 0 <= colors[40, 40, 40] - 2 * 128 * 128 < 200, "normalised and back, to the level"
    said = capsys.readouterr().err
    for which in ("first", "second", "third"):
        assert f"{which} batch: images (normalised)" in said
    assert said.count("batch: images (normalised)") == 3
    assert "from 40 to 40" in said


def test_without_being_asked_nothing_is_drawn_and_batches_are_the_loaders(tmp_path):
    aids = debugging(tmp_path)
    given = steps()
    assert aids.batches(given) is given
    aids.show([batch_of(1)], lambda batch: pytest.fail("nobody asked"))
    aids.step_done(1.0)
    aids.close()
    assert aids.saves
    assert not list(tmp_path.iterdir())


def test_one_batch_comes_again_and_again_though_its_memory_is_used_for_others(tmp_path):
    aids = debugging(tmp_path, overfit=True)
    batches = aids.batches(steps())
    for _ in range(4):
        [batch] = next(batches)
        assert batch["images"].unique().tolist() == [1]
    assert not aids.saves


@pytest.mark.parametrize("losses", [[2.0, 2.0, 2.0, 2.0], [1.0, 1.5, 2.0, 2.5], [2.0, float("nan")]])
def test_a_loss_that_does_not_fall_on_one_batch_is_an_error(tmp_path, losses):
    aids = debugging(tmp_path, overfit=True)
    for loss in losses:
        aids.step_done(loss)
    with pytest.raises(PretrainError, match="did not fall") as error:
        aids.verdict()
    assert error.value.exit_code == 1


def test_a_loss_that_falls_on_one_batch_is_told(tmp_path):
    aids = debugging(tmp_path, overfit=True)
    for step in range(20):
        aids.step_done(2.0 - step / 10)
    assert aids.verdict() == "one batch, 20 times: its loss went from 1.8 to 0.3"


def test_a_profile_has_the_steps_that_were_asked_for_after_the_first_two(tmp_path, capsys):
    profile = StepProfile(tmp_path / "profile", 3, CPU)
    for _ in range(8):
        torch.ones(8, 8) @ torch.ones(8, 8)
        profile.step_done()
    profile.close()
    assert "3 steps traced" in capsys.readouterr().err
    assert (tmp_path / "profile" / "trace.json.gz").stat().st_size > 100
    row = next(
        line for line in (tmp_path / "profile" / "operators.txt").read_text().splitlines() if "::mm" in line
    )
    assert row.split()[-1] == "3", "one product a step"


def test_a_run_too_short_for_a_profile_says_so(tmp_path, capsys):
    profile = StepProfile(tmp_path / "profile", 3, CPU)
    profile.step_done()
    profile.close()
    assert "before there was anything to trace" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [0, -1])
def test_a_profile_of_no_steps_is_wrong_usage(steps):
    with pytest.raises(UsageError, match="--profile"):
        Asked.of(argparse.Namespace(debug=False, profile=steps, overfit_one_batch=False))
