"""A run whose data changes half-way: trained through, and resumed elsewhere on either side of the change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from launching import run_ranks
from small_run import RECIPE, losses, pretrain

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import read_manifest

B = RECIPE["train"]["global_batch_size"]


def run_pretrain(*arguments: str, expect: int = 0) -> str:
    done = pretrain(*arguments)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("more")
    options = ["--samples", "90", "--image-size", "32", "--classes", "6", "--seed", "9"]
    run_pretrain("data", "synth", str(root / "images"), *options)
    run_pretrain("data", "pack", str(root / "images"), str(root / "shards"), "--chunk-samples", "16")
    return root / "shards"


def write_recipe(path: Path, run_dir: Path, shards: Path) -> Path:
    data = {**RECIPE["data"], "train": str(shards)}
    path.write_text(yaml.safe_dump({**RECIPE, "run_dir": str(run_dir), "data": data}))
    return path


def move_run(source: Path, target: Path, *, until: int) -> None:
    """A copy of a run as it was when its newest checkpoint was that of step `until`."""
    shutil.copytree(source, target)
    (target / "finished.json").unlink()
    for folder in (target / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > until:
            shutil.rmtree(folder)
    (target / "journal.jsonl").unlink()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_change_and_an_exclusion_in_mid_run_with_resumes_on_either_side(
    tmp_path: Path, shards: Path, more: Path
) -> None:
    """Steps 1 to 6 on one dataset, then on two without some samples; compared over resumes at 3 and at 9."""
    run_dir = tmp_path / "run"
    recipe = str(write_recipe(tmp_path / "recipe.yaml", run_dir, shards))
    # Half of the run: its checkpoints are those of the whole one's first half, for the schedule is the same.
    run_pretrain("train", recipe)
    move_run(run_dir, tmp_path / "half", until=6)
    shutil.rmtree(run_dir)
    (tmp_path / "half").rename(run_dir)

    listing = [json.loads(line) for line in run_pretrain("order", str(run_dir), "--count", "48").splitlines()]
    excluded = sorted({line["key"] for line in listing})[::2]
    (tmp_path / "keys.txt").write_text("\n".join(excluded) + "\n")
    change = ["data-change", str(run_dir), "--add", f"{more}=0.5", "--exclude", str(tmp_path / "keys.txt")]
    assert f"from sample {6 * B} on" in run_pretrain(*change)
    said = run_pretrain("train", recipe)
    assert f"{more}: 5 of 16 lanes" in said
    assert find_newest(run_dir).name == "step-00000012"
    segments = read_manifest(find_newest(run_dir)).segments
    assert [segment["start"] for segment in segments] == [0, 6 * B]
    assert [share["lanes"] for share in segments[1]["datasets"]] == [11, 5]
    assert segments[1]["datasets"][0]["excluded"]
    expected = losses(run_dir)
    assert sorted(expected) == list(range(7, 13))

    # What was seen is what the order lists, and the audit says so of every key.
    total = 12 * B
    listing = [
        json.loads(line) for line in run_pretrain("order", str(run_dir), "--count", str(total)).splitlines()
    ]
    assert not {line["key"] for line in listing if line["g"] >= 6 * B} & set(excluded)
    keys = sorted({line["key"] for line in listing} | set(excluded))
    (tmp_path / "all.txt").write_text("\n".join(keys) + "\n")
    lines = [
        json.loads(line)
        for line in run_pretrain("order", str(run_dir), "--audit", str(tmp_path / "all.txt")).splitlines()
    ]
    seen = {line["g"]: line["key"] for line in lines if line["event"].startswith("seen")}
    assert seen == {line["g"]: line["key"] for line in listing}
    assert lines[1]["datasets"][0]["cut_short"] == {"epoch": 0, "seen": 6 * B, "of": 150}
    assert all(line["committed"] and line["step"] == line["g"] // B + 1 for line in lines if "g" in line)

    # Resumed before the change, whose checkpoint is lost, and after it; on three ranks and on one device.
    for newest, world_size in ((3, 3), (9, 1)):
        copy = tmp_path / f"from-{newest}"
        move_run(run_dir, copy, until=newest)
        recipe = str(write_recipe(tmp_path / "copy.yaml", copy, shards))
        if world_size == 1:
            run_pretrain("train", recipe)
        else:
            run_ranks(world_size, ["-m", "pretrain.train", recipe], timeout_seconds=200, folder=tmp_path)
        got = losses(copy)
        assert sorted(got) == list(range(newest + 1, 13))
        common = {step: loss for step, loss in expected.items() if step in got}
        assert {step: got[step] for step in common} == pytest.approx(common, rel=1e-5)

    # A run that lost its list of changes does not go on as if there had been none.
    (run_dir / "segments.json").unlink()
    recipe = str(write_recipe(tmp_path / "recipe.yaml", run_dir, shards))
    said = run_pretrain("train", recipe, "train.steps=14", expect=4)
    assert f"segment 1: from sample {6 * B}: " in said
    assert "the run's segments.json is not the one it had" in said


def test_datasets_that_do_not_go_together_are_refused_before_anything_is_written(
    tmp_path: Path, shards: Path, recipe: Path
) -> None:
    options = ["--samples", "20", "--image-size", "32"]
    run_pretrain("data", "synth", str(tmp_path / "four"), *options, "--classes", "4")
    run_pretrain("data", "pack", str(tmp_path / "four"), str(tmp_path / "four-shards"))
    train = f"data.train=[{{url: {shards}, weight: 2}}, {{url: {tmp_path / 'four-shards'}}}]"
    for command in (["train", str(recipe)], ["train", str(recipe), "--dry-run"]):
        said = run_pretrain(*command, train, expect=2)
        assert str(shards) in said
        assert str(tmp_path / "four-shards") in said
        assert "cannot be learned from together" in said
    assert not (tmp_path / "run").exists()
    said = run_pretrain("train", str(recipe), train, "objective.name=mae", "--dry-run")
    assert "11 of 16 lanes (68.75% of every batch)" in said
    said = run_pretrain("train", str(recipe), f"data.train=[{shards}, {shards}/]", "--dry-run", expect=2)
    assert "holds the same samples as" in said
