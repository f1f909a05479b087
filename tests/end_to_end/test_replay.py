"""`pretrain replay`: a step's own batch, with its losses and gradients, from the run's folder alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import pretrain
from test_resume import write_recipe

from pretrain.assemble import build_objective
from pretrain.cli import main
from pretrain.config.load import load_config
from pretrain.inspection import inspect
from pretrain.metrics.journal import read_journal, steps_of

STEPS, B = 5, 16


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Five float32 steps in one process, a checkpoint after steps 2, 4 and 5."""
    root = tmp_path_factory.mktemp("replayed")
    recipe = write_recipe(
        root / "recipe.yaml",
        root / "run",
        shards,
        data={"mixup": 0.8, "erasing": 0.3},
        train={"steps": STEPS},
        checkpoint={"every_steps": 2},
    )
    done = pretrain("train", str(recipe))
    assert done.returncode == 0, done.stderr
    return root / "run"


def replay(run_dir: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["replay", str(run_dir), "--out", str(out), *arguments]) == 0
    return json.loads((out / "replay.json").read_text())


def test_a_step_right_after_a_checkpoint_comes_out_as_the_journal_has_it_with_the_orders_own_keys(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = replay(run_dir, tmp_path, "--step", "3", "--images", "6")
    journalled = steps_of(read_journal(run_dir / "journal.jsonl"))[3]
    assert got["weights_step"] == 2
    assert got["loss"] == pytest.approx(journalled["loss"], rel=1e-6)
    assert got["grad_norm"] == pytest.approx(journalled["grad_norm"], rel=1e-5)
    assert math.fsum(sample["loss"] for sample in got["samples"]) / B == pytest.approx(got["loss"], rel=1e-6)
    assert math.sqrt(sum(norm**2 for norm in got["layers"].values())) == pytest.approx(got["grad_norm"])
    assert {"backbone.blocks.0", "backbone.blocks.1", "head.weight"} <= set(got["layers"])
    assert (got["first_nonfinite_output"], got["first_nonfinite_gradient"]) == (None, None)

    capsys.readouterr()
    assert main(["order", str(run_dir), "--start", str(2 * B), "--count", str(B)]) == 0
    order = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    stands = {line["g"]: (line["key"], line["shard"]) for line in order}
    assert {sample["g"]: (sample["key"], sample["shard"]) for sample in got["samples"]} == stands
    with Image.open(tmp_path / "batch.png") as sheet:
        assert sheet.size == (3 * 136 + 8, 2 * 166 + 8)


def test_a_position_is_the_same_batch_and_another_checkpoint_gives_another_loss(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_step = replay(run_dir, tmp_path / "a", "--step", "5")
    assert "older" not in capsys.readouterr().out
    by_position = replay(run_dir, tmp_path / "b", "--position", str(4 * B))
    assert by_position["samples"] == by_step["samples"]
    older = replay(
        run_dir, tmp_path / "c", "--step", "5", "--from", str(run_dir / "checkpoints" / "step-00000002")
    )
    assert "2 update(s) older" in capsys.readouterr().out
    assert [sample["key"] for sample in older["samples"]] == [sample["key"] for sample in by_step["samples"]]
    assert older["loss"] != by_step["loss"]


def test_before_the_first_checkpoint_the_weights_are_those_that_the_seed_gives(
    run_dir: Path, tmp_path: Path
) -> None:
    got = replay(run_dir, tmp_path, "--step", "1")
    journalled = steps_of(read_journal(run_dir / "journal.jsonl"))[1]
    assert "of its seed" in got["weights"]
    assert got["loss"] == pytest.approx(journalled["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--step", "0"], "counted from 1"),
        (["--position", "3"], "multiples of the run's 16 lanes"),
        (["--step", "1", "--from", "/nowhere"], "is not a checkpoint"),
        (["--step", "1", "--images", "0"], "at least 1"),
    ],
)
def test_wrong_usage_is_refused_with_exit_code_2(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["replay", str(run_dir), "--out", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_first_module_that_is_not_finite_is_named_and_the_samples_that_made_it_so(run_dir: Path) -> None:
    config = load_config(str(run_dir / "config.yaml"), ["data.mixup=0"])
    generator = torch.Generator().manual_seed(0)
    batch = {
        "images": torch.randn(6, 3, 32, 32, generator=generator),
        "labels": torch.arange(6),
        "weights": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0]),
        "positions": torch.tensor([3, 4, 5, 6, -1, 8]),
    }

    def prepared(batch: Any) -> Any:
        return batch["images"], batch

    objective = build_objective(config, num_classes=6)
    sound = inspect(objective, [batch], prepared, bf16=False)
    assert sound.positions == [3, 4, 5, 6, 8], "a pad is no sample"
    for i, g in enumerate(sound.positions):  # as if it were alone
        alone = {name: values[batch["positions"] == g] for name, values in batch.items()}
        objective.zero_grad()
        assert inspect(objective, [alone], prepared, bf16=False).loss == pytest.approx(
            sound.losses[i], rel=1e-5
        )

    struck = {**batch, "images": batch["images"].clone()}
    struck["images"][2, 0, 5, 5] = math.nan
    objective.zero_grad()
    found = inspect(objective, [struck], prepared, bf16=False)
    assert [math.isnan(loss) for loss in found.losses] == [False, False, True, False, False]
    assert found.first_output is not None
    assert found.first_output.startswith("backbone.patch_embed")
    assert "an input that is not" in found.first_output

    with torch.no_grad():
        objective.backbone.blocks[1].mlp.fc1.weight[0, 0] = math.inf
    objective.zero_grad()
    found = inspect(objective, [batch], prepared, bf16=True)
    assert found.first_output is not None
    assert found.first_output.startswith(
        "backbone.blocks.1.mlp.fc1 (Linear), of a finite input, whose weights"
    )
    assert found.parameters == ["backbone.blocks.1.mlp.fc1.weight"]
