"""A recipe that is wrong is refused before torch is there, and before anything is written."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from command_rows import Result, Row, check
from small_run import pretrain

RECIPE_ERRORS = {
    "a typo in a key": ("train.stpes=3", "did you mean train.steps?"),
    "a section that does not exist": ("optimizer.lr=1", "unknown key optimizer; did you mean optim?"),
    "a wrong type": ("train.steps=three", "train.steps: input should be a valid integer, got 'three' (str)"),
    "an odd batch": ("train.global_batch_size=15", "is odd; images are paired for mixing, so take 16 or 14"),
    "an odd micro-batch": ("train.micro_batch_size=3", "train.micro_batch_size=3 is odd"),
    "a port that is none": ("metrics.port=99999", "less than or equal to 65535, got 99999"),
    "a word that is no override": ("oops", "'oops' is not an override; write key.path=value"),
    "a mirror's URL with a secret": (
        "checkpoint.mirror=s3://k:s@b/c",
        "checkpoint.mirror has credentials in its URL",
    ),
    "what the recipe says, said again to DeepSpeed": (
        "deepspeed.train_batch_size=3",
        "deepspeed.train_batch_size follows from train.global_batch_size",
    ),
}


@pytest.mark.parametrize("wrong", RECIPE_ERRORS)
def test_a_wrong_recipe_is_refused_with_2_at_once_and_nothing_is_written(
    wrong: str, recipe: Path, tmp_path: Path
) -> None:
    override, words = RECIPE_ERRORS[wrong]
    before = sorted(tmp_path.rglob("*"))
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = pretrain("train", str(recipe), override)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(Row(command="", code=2, says=(words,)), Result(code=done.returncode, said=done.stderr))
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    # Of a core, and not by the clock, which a busy machine stretches. Importing torch alone takes more.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 2.0


def test_a_recipe_that_is_not_there_or_not_yaml_is_refused_with_2(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {steps: 1\n")
    doubled = tmp_path / "doubled.yaml"
    doubled.write_text("seed: 1\nseed: 2\n")
    for path, words in (
        (tmp_path / "none.yaml", "no such recipe"),
        (broken, "is not valid YAML"),
        (doubled, "line 2: the key 'seed' stands twice"),
    ):
        done = pretrain("train", str(path))
        check(
            Row(command="", code=2, says=(str(path), words)), Result(code=done.returncode, said=done.stderr)
        )
