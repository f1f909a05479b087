"""A transfer suite: what it refuses, what makes two parts the same, its table, and, slow, the whole of it."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, clean_environment

from launch.suite import STARTS, parts_of, read_suite
from launch.transfer import Book, places
from launch.transfer_table import GAIN, Outcome, as_csv, as_json, cells_of, markdown
from pretrain.cli import main
from pretrain.config.load import load_config
from pretrain.errors import ConfigError, UsageError
from pretrain.intervals import t_interval
from pretrain.metrics.journal import Journal

RECIPE = {
    "run_dir": "nowhere",
    "model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 16},
    "data": {"train": "nowhere", "workers": 0},
    "train": {"global_batch_size": 16, "steps": 4, "precision": "float32"},
    "optim": {"lr": 0.003},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    sizes = ["--samples", "60", "--image-size", "16", "--classes", "3"]
    assert main(["data", "synth", str(root / "images"), *sizes]) == 0
    assert main(["data", "pack", str(root / "images"), str(root / "shards"), "--val-fraction", "0.4"]) == 0
    return root / "shards"


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """Something to start from, as far as a suite looks at it."""
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "backbone"


@pytest.fixture
def write(tmp_path: Path, shards: Path, backbone: Path) -> Any:
    """Write a suite, changed as asked; returns its file."""

    def written(of_parts: dict[str, Any] | None = None, **changes: Any) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(of_parts or RECIPE))
        values = {
            "recipe": str(tmp_path / "recipe.yaml"),
            "init_from": str(backbone),
            "seeds": [3, 5],
            "datasets": {"shapes": {"train": str(shards / "train"), "val": str(shards / "val")}},
            **changes,
        }
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "suite.yaml"

    return written


def keys(suite: Path) -> dict[tuple[str, str, int], str]:
    return {(part.dataset, part.start, part.seed): part.key for part in parts_of(read_suite(suite))}


def test_a_part_is_each_dataset_with_each_start_and_seed_as_one_would_type_it(
    write: Any, shards: Path
) -> None:
    suite = write(
        overrides={"train.steps": 6, "optim.lr": 0.1},
        starts={"scratch": {"optim.lr": 0.2}, "linear-probe": None},
        datasets={
            name: {
                "train": str(shards / "train"),
                "val": str(shards / "val"),
                "overrides": {"train.steps": steps},
            }
            for name, steps in (("shapes", 7), ("forms", 8))
        },
    )
    parts = parts_of(read_suite(suite))
    assert [(part.dataset, part.start, part.seed) for part in parts] == [
        (dataset, start, seed)
        for dataset in ("shapes", "forms")
        for start in ("scratch", "linear-probe")
        for seed in (3, 5)
    ]
    recipe = read_suite(suite).recipe
    scratch, probe = (load_config(recipe, [*parts[i].overrides, "run_dir=x"]) for i in (1, 6))
    assert (scratch.train.steps, scratch.optim.lr, scratch.seed, scratch.init_from) == (7, 0.2, 5, None)
    assert (probe.train.steps, probe.optim.lr, probe.seed) == (8, 0.1, 3)
    assert probe.init_from == read_suite(suite).init_from
    assert probe.optim.freeze_backbone_steps > 8
    assert scratch.data.train == str(shards / "train")
    assert len({part.key for part in parts}) == len({part.name for part in parts}) == len(parts)


def test_a_part_is_the_same_while_nothing_that_decides_its_result_changes(
    write: Any, shards: Path, backbone: Path, tmp_path: Path
) -> None:
    before = keys(write())
    (tmp_path / "moved").symlink_to(shards)
    moved = {"shapes": {"train": str(tmp_path / "moved" / "train"), "val": str(tmp_path / "moved" / "val")}}
    assert keys(write(datasets=moved)) == before
    how = {"data.workers": 2, "checkpoint.every_steps": 7, "metrics.log_every_steps": 5}
    assert keys(write(overrides=how)) == before
    assert keys(write(overrides={"train.steps": 5})).keys() == before.keys()
    assert not set(keys(write(overrides={"train.steps": 5})).values()) & set(before.values())
    swapped = {"shapes": {"train": str(shards / "val"), "val": str(shards / "train")}}
    assert not set(keys(write(datasets=swapped)).values()) & set(before.values())

    (backbone / "model.safetensors").write_bytes(b"other weights")
    after = keys(write())
    changed = {place for place in before if after[place] != before[place]}
    assert changed == {place for place in before if place[1] != "scratch"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sedes": [1]}, "sedes: Extra inputs are not permitted; it knows the keys recipe, init_from"),
        ({"seeds": [1, 1]}, "give each seed once"),
        ({"seeds": []}, "seeds: "),
        ({"init_from": None}, "the starts pretrained, linear-probe need init_from"),
        ({"starts": {"finetuned": {}}}, "Input should be 'pretrained', 'scratch' or 'linear-probe'"),
        ({"overrides": {"seed": 3}}, "overrides: seed is each part's own"),
        ({"starts": {"scratch": {"init_from": "x"}}}, "starts.scratch: init_from is each part's own"),
        ({"datasets": {"../x": {"train": "a", "val": "b"}}}, "becomes a folder's"),
        (
            {"overrides": {"train.stepz": 3}},
            "for shapes, pretrained: unknown key train.stepz; did you mean train.steps",
        ),
        ({"overrides": {"checkpoint.mirror": "s3://bucket/mirror"}}, "a mirror belongs to one run"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: no such recipe"),
        ({"init_from": "nowhere"}, "init_from: nowhere: there is no run"),
    ],
)
def test_a_wrong_suite_is_refused_before_anything_is_made(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    assert main(["transfer", str(write(**changes)), str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_packed_and_recipes_without_classes_are_refused(write: Any, shards: Path) -> None:
    images = {"shapes": {"train": str(shards.parent / "images"), "val": str(shards / "val")}}
    with pytest.raises(UsageError, match="pack them first"):
        keys(write(datasets=images))
    with pytest.raises(ConfigError, match="transfer is measured by classification"):
        keys(write({**RECIPE, "objective": {"name": "mae"}}))


def outcome(start: str, seed: int, value: float, dataset: str = "shapes") -> Outcome:
    return Outcome(dataset=dataset, start=start, seed=seed, value=value, step=4, run_dir="x")


def test_the_table_has_means_intervals_and_the_gain_of_the_same_seeds() -> None:
    pretrained, scratch = (0.50, 0.60, 0.70), (0.30, 0.41, 0.52)
    outcomes = [outcome("pretrained", seed, value) for seed, value in enumerate(pretrained)]
    outcomes += [outcome("scratch", seed, value) for seed, value in enumerate(scratch)]
    outcomes += [outcome("scratch", 0, 0.25, "forms")]
    cells = cells_of(
        outcomes, datasets=["shapes", "forms"], starts=["pretrained", "scratch"], seeds=[0, 1, 2]
    )
    gains = t_interval([0.20, 0.19, 0.18])
    assert markdown(cells, metric="top1", num_seeds=3, source="runs/x").splitlines() == [
        "validation top1 at the end, mean of 3 seeds ± 95 % t-interval; pretrained: runs/x",
        "",
        f"| dataset | pretrained    | scratch         | {GAIN} |",
        "|---------|---------------|-----------------|----------------------|",
        "| shapes  | 60.0 ± 24.8 % | 41.0 ± 27.3 %   | 19.0 ± 2.5 %         |",
        "| forms   | –             | 25.0 % (1 of 3) | –                    |",
    ]
    rows = list(csv.DictReader(as_csv(cells).splitlines()))
    assert [(row["dataset"], row["start"], row["seeds"], row["missing"]) for row in rows][2:4] == [
        ("shapes", GAIN, "3", "0"),
        ("forms", "pretrained", "0", "3"),
    ]
    assert float(rows[2]["low"]) == pytest.approx(gains.low)
    assert float(rows[2]["high"]) == pytest.approx(gains.high)
    values = as_json(cells, outcomes, metric="top1")
    assert values["table"][1]["by_seed"] == {"0": 0.30, "1": 0.41, "2": 0.52}
    assert values["table"][1]["mean"] == pytest.approx(0.41)
    assert len(values["parts"]) == 7
    losses = cells_of(outcomes, datasets=["shapes"], starts=["scratch"], seeds=[0, 1, 2])
    assert "| 0.41 ± 0.27 |" in markdown(losses, metric="loss", num_seeds=3, source="x")


def test_parts_that_are_finished_are_read_and_not_run_again(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here all are, by folders that look as `pretrain train` leaves them: nothing is started."""
    suite, out = write(starts={"scratch": {}}), tmp_path / "out"
    read = read_suite(suite)
    book = Book(read, parts_of(read), out)
    for number, part in enumerate(parts_of(read)):
        run_dir = book.run_dir(part)
        run_dir.mkdir(parents=True)
        journal = Journal(run_dir / "journal.jsonl", attempt=1)
        for top1 in (0.9, 0.25 * (number + 1)):  # the last one counts
            journal.append("validation", step=4, samples=64, loss=1.0, top1=top1)
        journal.close()
        (run_dir / "finished.json").write_text('{"step": 4}')
    assert main(["transfer", str(suite), str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 parts, 2 of them finished" in said
    assert "$ pretrain train" not in said
    assert "| shapes  | 37.5 ± 158.8 % |" in (out / "table.md").read_text()
    assert json.loads((out / "table.json").read_text())["table"][0]["by_seed"] == {"3": 0.25, "5": 0.5}

    assert main(["transfer", str(write(starts={"scratch": {}}, metric="recall")), str(out)]) == 2
    assert "tells no recall; metric may be one of loss, top1" in capsys.readouterr().err


def test_parts_share_gpus_in_turn_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.transfer.count_cores", lambda: 8)
    monkeypatch.setattr("launch.transfer.count_cuda_devices", lambda: 0)
    assert places(None, 20) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert places(None, 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert places(2, 20) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr("launch.transfer.count_cuda_devices", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(None, 20)] == ["5", "7"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(3, 20)] == ["5", "7", "5"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_suite_that_is_interrupted_goes_on_and_ends_with_its_table(
    write: Any, shards: Path, tmp_path: Path
) -> None:
    pretrained, out = tmp_path / "pretrained", tmp_path / "out"
    recipe = {**RECIPE, "train": {**RECIPE["train"], "steps": 30}, "checkpoint": {"every_steps": 5}}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    words = [f"run_dir={pretrained}", f"data.train={shards / 'train'}", "train.steps=2"]
    command = [sys.executable, "-m", "pretrain.cli"]
    environment = {"env": clean_environment(), "cwd": ROOT}
    subprocess.run([*command, "train", str(tmp_path / "pretrain.yaml"), *words], check=True, **environment)
    # one of the starts cannot be: its network is another than the backbone's
    long = {"train.steps": 300}  # still at work when it is interrupted
    starts = {"scratch": long, "linear-probe": {}, "pretrained": {"model.embed_dim": 32}}
    suite = write(recipe, init_from=str(pretrained), starts=starts, seeds=[0])
    transfer = [*command, "transfer", str(suite), str(out), "--jobs", "1"]

    running = subprocess.Popen(transfer, **environment)
    deadline = time.monotonic() + 240
    while not list(out.glob("parts/shapes-scratch-*/checkpoints/step-*")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    assert running.wait(120) == 130

    again = subprocess.run(transfer, capture_output=True, text=True, **environment)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "1 of 3 parts failed" in again.stderr
    assert "shapes, pretrained, seed 0: failed" in again.stdout
    table = {row["start"]: row for row in json.loads((out / "table.json").read_text())["table"]}
    assert table["pretrained"]["mean"] is None
    assert table["scratch"]["mean"] is not None
    [probe] = out.glob("parts/shapes-linear-probe-*")
    starts_seen = [
        line for line in (probe / "journal.jsonl").read_text().splitlines() if '"event": "start"' in line
    ]
    assert len(starts_seen) == 1
    [scratch] = out.glob("parts/shapes-scratch-*")
    assert '"resumed": true' in (scratch / "journal.jsonl").read_text()
    from pretrain.formats.incoming import read_backbone

    frozen, before = (read_backbone(run).backbone for run in (probe, pretrained))
    assert all(value.equal(before[name]) for name, value in frozen.items())

    third = subprocess.run(transfer, capture_output=True, text=True, **environment)
    assert "3 parts, 2 of them finished" in third.stdout
    assert set(STARTS) == set(table) - {GAIN}
