"""How many loader workers a run has enters neither its samples nor, to the last bit, its losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import losses, pretrain
from test_resume import write_recipe

RUNS = {
    "classification": {"objective": {"name": "classification"}, "data": {"mixup": 0.8, "cutmix": 1.0}},
    "mae": {"objective": {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}},
}
STEPS = 4


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_losses_with_no_worker_with_one_and_with_two_are_the_same_bit_for_bit(
    name: str, shards: Path, tmp_path: Path
) -> None:
    """With stochastic depth, colour, and mixing or masks; of two workers each prepares a part of every step."""
    found = {}
    for workers in (1, 0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        recipe = write_recipe(
            folder / "recipe.yaml", folder / "run", shards, **RUNS[name], train={"steps": STEPS}
        )
        done = pretrain("train", str(recipe), f"data.workers={workers}")
        assert done.returncode == 0, done.stderr
        found[workers] = losses(folder / "run")
    assert sorted(found[1]) == list(range(1, STEPS + 1))
    assert len(set(found[1].values())) == STEPS
    assert found[0] == found[1]
    assert found[2] == found[1]
