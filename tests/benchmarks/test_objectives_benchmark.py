"""`pretrain benchmark objectives`: equal budgets, honest verdicts, and a command that goes on where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, clean_environment
from timm_reference import import_timm
from torch.utils.flop_counter import FlopCounterMode

from pretrain.assemble import build_objective
from pretrain.benchmarks.objectives_cells import BATCH, CELLS, CLASSIFIER, digest, recipe
from pretrain.benchmarks.objectives_runs import read_run, timm_spec
from pretrain.benchmarks.objectives_table import as_markdown, as_text, summary
from pretrain.cli import main
from pretrain.config.schema import RunConfig
from pretrain.errors import PretrainError
from pretrain.metrics.journal import Journal

FACTS = {"images": 640, "train_samples": 100, "val_samples": 50, "num_classes": 5}


def make_recipe(cell: str, **changed: Any) -> RunConfig:
    asked = {"seed": 0, "images": 6400, "train": "t", "val": "v", "run_dir": "r", "workers": 1, **changed}
    return recipe(cell, **asked)


def test_all_cells_see_as_many_images_with_networks_of_about_as_many_multiplications() -> None:
    assert set(CELLS) == {
        *(f"{one}-{net}" for one in ("classification", "simmim") for net in ("vit", "swin", "pvt")),
        "mae-vit",
    }
    steps, works = set(), []
    for cell in CELLS:
        config = make_recipe(cell)
        steps.add((config.train.steps, config.train.global_batch_size))
        with torch.device("meta"):
            backbone = build_objective(config, num_classes=100).backbone
            with FlopCounterMode(display=False) as counter:
                backbone.features(torch.empty(1, 3, 32, 32))
        works.append(counter.get_total_flops())
    assert steps == {(6400 // BATCH, BATCH)}
    assert max(works) < 1.5 * min(works), works


def test_a_result_is_of_its_recipe_and_data_wherever_they_lie() -> None:
    def told(config: RunConfig, train: str = "a") -> str:
        return digest(config, train=train, val="b")

    first = told(make_recipe(CLASSIFIER))
    assert told(make_recipe(CLASSIFIER, train="t2", val="v2", run_dir="r2", workers=0)) == first
    others = [make_recipe(CLASSIFIER, seed=1), make_recipe(CLASSIFIER, images=12800), make_recipe("mae-vit")]
    assert len({first, told(make_recipe(CLASSIFIER), train="c"), *map(told, others)}) == 5


def test_timms_network_and_recipe_are_those_of_our_classifier(tmp_path: Path) -> None:
    import_timm()
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_weight_decay

    config = make_recipe(CLASSIFIER)
    spec = json.loads(json.dumps(timm_spec(config, tmp_path / "i.npz", 7)))
    theirs = VisionTransformer(**spec["model"])
    ours = build_objective(config, num_classes=7)
    shapes = {name.removeprefix("backbone."): p.shape for name, p in ours.named_parameters()}
    assert {name: p.shape for name, p in theirs.named_parameters()} == shapes
    groups = param_groups_weight_decay(theirs, spec["weight_decay"], theirs.no_weight_decay())
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        map(torch.Size.numel, shapes.values())
    )
    for key in ("steps", "lr", "weight_decay", "betas", "label_smoothing", "clip_grad_norm", "crop_scale"):
        assert spec[key], key


def seeds_of(**values: list[Any]) -> list[dict[str, Any]]:
    return [
        {"seconds": 1.0, **{name: of[seed] for name, of in values.items()}}
        for seed in range(len(next(iter(values.values()))))
    ]


def probes(before: list[float], after: list[float]) -> list[dict[str, float]]:
    return [{"before": b, "after": a} for b, a in zip(before, after, strict=True)]


def test_learned_means_that_the_intervals_do_not_overlap_and_level_that_they_do() -> None:
    clear, close = (
        probes([0.05, 0.06, 0.07], [0.2, 0.21, 0.22]),
        probes([0.05, 0.06, 0.07], [0.06, 0.08, 0.1]),
    )
    worse = probes([0.2, 0.21, 0.22], [0.05, 0.06, 0.07])
    results = {
        CLASSIFIER: seeds_of(knn=clear, knn_standardized=clear, linear=close, top1=[0.3, 0.31, 0.32]),
        "mae-vit": seeds_of(knn=worse, knn_standardized=close, linear=clear),
        "simmim-pvt": seeds_of(knn=clear[:1], knn_standardized=clear[:1], linear=clear[:1]),
        "timm": seeds_of(top1=[0.29, 0.31, 0.33]),
    }
    found = summary(results, facts=FACTS)
    learned = {
        (cell, probe): found["cells"][cell][probe]["learned"]
        for cell in found["cells"]
        for probe in ("knn", "knn_standardized", "linear")
    }
    assert learned == {
        (CLASSIFIER, "knn"): True,
        (CLASSIFIER, "knn_standardized"): True,
        (CLASSIFIER, "linear"): False,
        ("mae-vit", "knn"): False,
        ("mae-vit", "knn_standardized"): False,
        ("mae-vit", "linear"): True,
    }
    assert found["timm"]["ours_is"] == "level"
    assert found["too_few_seeds"] == ["simmim-pvt"]
    for text in (as_text(found), as_markdown(found)):
        assert "31.00 ± 2.48" in text
        assert "level with it" in text
        assert "simmim-pvt" in text
    for top1, verdict in (([0.4, 0.41, 0.42], "below"), ([0.1, 0.11, 0.12], "above")):
        assert summary({**results, "timm": seeds_of(top1=top1)}, facts=FACTS)["timm"]["ours_is"] == verdict
    assert summary({"timm": results["timm"]}, facts=FACTS)["timm"] is None


def write_journal(run_dir: Path, *lines: tuple[str, dict[str, Any]]) -> None:
    run_dir.mkdir()
    journal = Journal(run_dir / "journal.jsonl", attempt=1)
    for event, fields in lines:
        journal.append(event, **fields)
    journal.close()


def test_a_run_is_read_from_its_journal_and_one_without_its_start_is_refused(tmp_path: Path) -> None:
    def probe(step: int, name: str, top1: float) -> tuple[str, dict[str, Any]]:
        return "probe", {"step": step, "probe": name, "top1": top1}

    after = [
        ("step", {"step": 1, "loss": 4.0}),
        ("step", {"step": 2, "loss": 3.0}),
        ("validation", {"step": 2, "loss": 3.5, "top1": 0.2}),
        probe(2, "knn", 0.1),
        probe(2, "knn_standardized", 0.15),
        probe(2, "linear", 0.2),
    ]
    before = probe(0, "knn", 0.01), probe(0, "knn_standardized", 0.015), probe(0, "linear", 0.02)
    write_journal(tmp_path / "a", *before, *after)
    assert read_run(tmp_path / "a") == {
        "steps": 2,
        "loss": {"first": 4.0, "last": 3.0},
        "knn": {"before": 0.01, "after": 0.1},
        "knn_standardized": {"before": 0.015, "after": 0.15},
        "linear": {"before": 0.02, "after": 0.2},
        "top1": 0.2,
    }
    write_journal(tmp_path / "b", *after)
    with pytest.raises(PretrainError, match="no knn probe before the first step"):
        read_run(tmp_path / "b")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--train and --val, of 96 and 48 images of 32 pixels in 4 classes."""
    root, arguments = tmp_path_factory.mktemp("data"), []
    for seed, (name, count) in enumerate((("train", "96"), ("val", "48"))):
        sizes = ["--image-size", "32", "--samples", count, "--classes", "4", "--seed", str(seed)]
        assert main(["data", "synth", str(root / f"{name}-images"), *sizes]) == 0
        assert (
            main(["data", "pack", str(root / f"{name}-images"), str(root / name), "--chunk-samples", "16"])
            == 0
        )
        arguments += [f"--{name}", str(root / name)]
    return arguments


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "1"], "--seeds 1: from 2"),
        (["--images", "63"], "--images 63: at least a batch"),
        (["--only", "timm", "--peer-python", "/bin/false"], "timm is not installed in /bin/false"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_written(
    shards: list[str], tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["benchmark", "objectives", *shards, "--out", str(out), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


def another_python(folder: Path, does: str) -> str:
    """What says that it has timm, and then does something else."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{does}\n')
    path.chmod(0o755)
    return str(path)


def run_timm(shards: list[str], folder: Path, python: str) -> int:
    only = ["--only", "timm", "--seeds", "2", "--images", "640", "--jobs", "1"]
    return main(
        ["benchmark", "objectives", *shards, "--out", str(folder / "out"), *only, "--peer-python", python]
    )


def test_a_run_that_fails_ends_the_command_with_what_it_said(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_timm(shards, tmp_path, another_python(tmp_path, "echo what is wrong; exit 3")) == 1
    told = capsys.readouterr().err
    assert "failed with exit code 3" in told
    assert "what is wrong" in told
    assert list((tmp_path / "out/results").iterdir()) == []


def test_a_result_that_is_there_is_not_measured_again(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = f'echo x >> {tmp_path}/calls; echo \'{{"top1": 0.5, "loss": 1.0}}\''
    for _ in range(2):
        assert run_timm(shards, tmp_path, another_python(tmp_path, count)) == 0
    assert (tmp_path / "calls").read_text() == "x\nx\n"  # a seed each
    assert "2 of 2 runs are done already" in capsys.readouterr().err
    held = np.load(next((tmp_path / "out").glob("*.npz")))
    assert held["train_images"].shape == (96, 32, 32, 3)
    assert held["val_images"].dtype == np.uint8
    assert set(held["val_labels"].tolist()) == set(range(4))


def test_ctrl_c_reaches_the_run_under_way_and_no_other_is_begun(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    python = another_python(tmp_path, f"echo x >> {begun}; exec sleep 60")

    def press() -> None:
        while not begun.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press, daemon=True)
    pressing.start()
    started = time.monotonic()
    assert run_timm(shards, tmp_path, python) == 130
    assert time.monotonic() - started < 40
    assert begun.read_text() == "x\n"
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_stopped_by_ctrl_c_and_started_again_it_goes_on_and_does_nothing_twice(
    shards: list[str], tmp_path: Path
) -> None:
    import_timm()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pretrain.cli", "benchmark", "objectives", *shards, "--out", str(out)]
    command += [
        "--only",
        CLASSIFIER,
        "timm",
        "--seeds",
        "2",
        "--images",
        "384",
        "--workers",
        "0",
        "--jobs",
        "1",
        "--json",
    ]

    def results() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (out / "results").glob("*.json")}

    first = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    journals = "runs/*seed-1*/run/journal.jsonl"
    try:
        deadline = time.monotonic() + 400
        while not any('"event": "step"' in path.read_text() for path in out.glob(journals)):
            assert first.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGINT)
        first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130
    before = results()
    assert {name.rsplit("-", 1)[0] for name in before} == {f"{CLASSIFIER}-seed-0", "timm-seed-0"}

    second = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=250
    )
    assert second.returncode == 0, second.stderr
    assert "2 of 4 runs are done already" in second.stderr
    after = results()
    assert len(after) == 4
    assert before.items() <= after.items()
    found = json.loads(second.stdout)
    assert found == json.loads((out / "objectives.json").read_text())
    cell = found["cells"][CLASSIFIER]
    assert (found["images"], cell["seeds"], found["timm"]["seeds"]) == (384, 2, [2, 2])
    for value in (cell["knn"]["before"], cell["linear"]["after"], cell["top1"], found["timm"]["timm"]):
        assert 0.0 < value["mean"] <= 1.0
    (journal,) = out.glob(journals)
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6], (
        "a step came twice"
    )
    assert [event["resumed"] for event in events if event["event"] == "start"] == [False, True]
