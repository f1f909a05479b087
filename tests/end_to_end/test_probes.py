"""A run that probes and draws itself: it learns the same, and what it finds is in its journal, metrics and pictures."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, free_port, run_ranks
from prometheus_client.parser import text_string_to_metric_families
from small_run import RECIPE, losses, train

from pretrain.analysis.choice import WHAT
from pretrain.cli import main
from pretrain.compare import final_values, read_runs
from pretrain.curves import read_curves
from pretrain.metrics.journal import read_journal
from pretrain.metrics.prometheus import MetricsServer
from pretrain.probes import suite
from pretrain.report import summarize

STEPS = 5
NAMES = ["knn", "few_shot_2", "few_shot_5", "linear", "dense"]


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("val")
    sizes = ["--samples", "50", "--image-size", "32", "--classes", "6", "--seed", "9"]
    assert main(["data", "synth", str(root / "images"), *sizes]) == 0
    assert main(["data", "pack", str(root / "images"), str(root / "shards")]) == 0
    return str(root / "shards")


def write(
    path: Path,
    shards: Path,
    val: str | None,
    probes: dict[str, Any] | None,
    analyze: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    sections = {
        **RECIPE,
        "run_dir": str(path.with_suffix("")),
        "data": {**RECIPE["data"], "train": str(shards), "val": val, "workers": 0},
        "train": {**RECIPE["train"], "steps": STEPS},
        "eval": {"probes": probes, "analyze": analyze},
        **more,
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def probes_of(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_journal(run_dir / "journal.jsonl") if record["event"] == "probe"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path, val: str) -> tuple[Path, Path]:
    """The same run without probes, and with all of them at steps 0, 2, 4 and 5, and with figures."""
    root = tmp_path_factory.mktemp("runs")
    probes = {"every_steps": 2, "at_start": True, "few_shot": [2, 5], "linear": True, "dense": True}
    limits = {"max_train_samples": 100, "max_val_samples": None}
    assert train(write(root / "plain.yaml", shards, val, None)) == 0
    figures = {"every_steps": 2, "num_images": 12}
    assert train(write(root / "probed.yaml", shards, val, {**probes, **limits}, figures)) == 0
    return root / "plain", root / "probed"


def test_a_run_with_probes_and_figures_has_the_losses_and_the_weights_of_one_without_bit_for_bit(
    runs: tuple[Path, Path],
) -> None:
    plain, probed = runs
    assert losses(probed) == losses(plain)
    assert len(losses(probed)) == STEPS
    digests = []
    for run_dir in runs:
        [manifest] = (run_dir / "checkpoints").glob(f"step-*{STEPS}/manifest.json")
        digests.append(json.loads(manifest.read_text())["files"])
    assert digests[0] == digests[1]


def test_each_probe_of_each_due_step_is_in_the_journal_the_report_and_the_comparison(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, probed = runs
    records = probes_of(probed)
    assert [(r["step"], r["probe"]) for r in records] == [(s, name) for s in (0, 2, 4, 5) for name in NAMES]
    assert all(0 <= r["top1"] <= 1 and r["by"] == "train" for r in records)
    assert {(r["train_samples"], r["val_samples"], r["num_classes"]) for r in records} == {(100, 50, 6)}

    curves = read_curves(probed)
    steps, top1 = curves.probes["knn"]
    assert steps.tolist() == [0, 2, 4, 5]
    assert top1.tolist() == [r["top1"] for r in records if r["probe"] == "knn"]
    assert summarize(curves)["probe dense"].startswith(f"{curves.probes['dense'][1][-1]:.4f} at last")
    assert main(["report", str(probed), "--out", str(tmp_path / "report.png")]) == 0
    rows = final_values(read_runs([plain, probed]))
    assert rows["probe linear, last"] == [None, curves.probes["linear"][1][-1]]
    assert probes_of(plain) == []


def test_figures_of_each_due_step_are_there_and_analyze_draws_the_last_again(
    runs: tuple[Path, Path], val: str, tmp_path: Path
) -> None:
    records = [r for r in read_journal(runs[1] / "journal.jsonl") if r["event"] == "analysis"]
    assert [(r["step"], r["images"], r["error"]) for r in records] == [
        (2, 12, None),
        (4, 12, None),
        (5, 12, None),
    ]
    names = sorted(f"{what}.{kind}" for what in WHAT for kind in ("csv", "png"))
    for step in (2, 4, 5):
        assert sorted(path.name for path in (runs[1] / f"analysis/step-{step:08}").iterdir()) == names
    assert not (runs[0] / "analysis").exists()
    words = ["--images", val, "--limit", "12", "--batch-size", "4"]  # as many at once as in training
    assert main(["analyze", str(runs[1]), str(tmp_path / "again"), *words]) == 0
    for name in names:
        if name.endswith("csv"):
            in_training = (runs[1] / "analysis" / f"step-{STEPS:08}" / name).read_text()
            assert (tmp_path / "again" / name).read_text() == in_training


@pytest.mark.parametrize(
    ("probe", "names"), [("knn", ["knn"]), ("few-shot", NAMES[1:3]), ("dense", ["dense"])]
)
def test_evaluate_finds_what_the_run_found_at_its_end(
    runs: tuple[Path, Path],
    shards: Path,
    val: str,
    probe: str,
    names: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_end = {
        r["probe"]: r["top1"] for r in probes_of(runs[1]) if r.get("by") == "train" and r["step"] == STEPS
    }
    capsys.readouterr()
    words = ["--probe", probe, "--shots", "2", "5", "--workers", "0", "--json"]
    assert main(["evaluate", str(runs[0]), "--train", str(shards), "--val", val, *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["probe"] for line in lines] == names
    assert {line["train_samples"] for line in lines} == {150}
    # The run looked at 100 of the 150: ask for the same.
    assert (
        main(["evaluate", str(runs[0]), "--train", str(shards), "--val", val, *words, "--limit", "100"]) == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["probe"]: line["top1"] for line in lines} == {name: at_end[name] for name in names}


def test_a_continued_network_is_probed_at_step_0_and_a_resume_takes_up_what_was_measured(
    runs: tuple[Path, Path], shards: Path, val: str, tmp_path: Path
) -> None:
    recipe = write(
        tmp_path / "more.yaml",
        shards,
        val,
        {"every_steps": 1, "few_shot": []},
        init_from=str(runs[0]),
        train={**RECIPE["train"], "steps": 2},
    )
    assert train(recipe) == 0
    # As if the features had been excellent when the run began: the next value is below its start and its best.
    journal = tmp_path / "more" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if line["event"] == "probe" and line["step"] <= 1:
            line["top1"] = 1.0
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(recipe, "train.steps=3") == 0
    records = read_journal(journal)
    assert [(r["step"], r["attempt"]) for r in records if r["event"] == "probe"] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
    ]
    [fall] = [r for r in records if r["event"] == "probe_falls" and r["attempt"] == 2]
    assert (fall["step"], fall["probe"], fall["below"], fall["reference"]) == (3, "knn", "best", 1.0)
    table = summarize(read_curves(tmp_path / "more"))
    assert "knn below its best at step 3" in table["probes that fell"]


def test_all_results_of_the_default_probes_stand_at_the_endpoint_while_the_run_is_there(
    shards: Path, val: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, close, scraped = free_port(), MetricsServer.close, []

    def read_first(server: MetricsServer) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            scraped.append(answer.read().decode())
        close(server)

    monkeypatch.setattr(MetricsServer, "close", read_first)
    probes = {"every_steps": 2, "linear": True, "dense": True}  # few_shot as it is by default
    recipe = write(tmp_path / "default.yaml", shards, val, probes, metrics={"port": port})
    assert train(recipe) == 0
    at_end = {r["probe"]: r["top1"] for r in probes_of(tmp_path / "default") if r["step"] == STEPS}
    assert list(at_end) == ["knn", "few_shot_5", "few_shot_10", "few_shot_25", "linear", "dense"]
    [text] = scraped
    shown: dict[str, dict[str, float]] = {"pretrain_probe_accuracy": {}, "pretrain_probe_falling": {}}
    for family in text_string_to_metric_families(text):
        if family.name in shown:
            shown[family.name] = {sample.labels["probe"]: sample.value for sample in family.samples}
    assert shown["pretrain_probe_accuracy"] == at_end
    assert shown["pretrain_probe_falling"].keys() == at_end.keys()


def test_probes_work_in_bf16_and_under_deterministic_algorithms(
    shards: Path, val: str, tmp_path: Path
) -> None:
    settings = {**RECIPE["train"], "steps": 1, "precision": "bf16", "deterministic": True}
    recipe = write(tmp_path / "bf16.yaml", shards, val, {"linear": True, "dense": True}, train=settings)
    assert train(recipe) == 0
    assert len(probes_of(tmp_path / "bf16")) == 6


def train_told_to_stop_in(where: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a run that gets a SIGTERM in the midst of its first probe."""
    original = getattr(suite, where)

    def told_meanwhile(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(suite, where, told_meanwhile)
        try:
            return train(recipe)
        finally:
            signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("where", ["knn_top1", "extract_features"])
def test_a_run_told_to_stop_in_a_probe_gives_it_up_saves_and_goes_on_to_the_same_losses(
    runs: tuple[Path, Path],
    shards: Path,
    val: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    recipe = write(tmp_path / "told.yaml", shards, val, {"every_steps": 2, "few_shot": []})
    assert train_told_to_stop_in(where, recipe, monkeypatch) == 75
    events = [(r["event"], r["step"]) for r in read_journal(tmp_path / "told" / "journal.jsonl")]
    assert ("evaluation_given_up", 2) in events
    assert ("checkpoint", 3) in events
    assert probes_of(tmp_path / "told") == []
    assert train(recipe) == 0
    assert losses(tmp_path / "told") == losses(runs[0])
    assert [r["step"] for r in probes_of(tmp_path / "told")] == [4, STEPS]


@pytest.mark.parametrize("where", ["knn_top1", "extract_features"])
def test_a_run_told_to_stop_in_the_probes_before_its_first_step_begins_anew_with_them(
    runs: tuple[Path, Path],
    shards: Path,
    val: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    recipe = write(tmp_path / "told.yaml", shards, val, {"at_start": True, "few_shot": []})
    run_dir = tmp_path / "told"
    assert train_told_to_stop_in(where, recipe, monkeypatch) == 75
    events = [(r["event"], r["step"]) for r in read_journal(run_dir / "journal.jsonl") if "step" in r]
    assert events[-2:] == [("evaluation_given_up", 0), ("stopped", 0)]
    assert losses(run_dir) == {}
    assert not list((run_dir / "checkpoints").glob("*"))
    record = json.loads((run_dir / "attempts/1/exit-0.json").read_text())
    assert (record["code"], record["reason"]) == (75, "asked to stop, saved nothing, before the first step")
    assert train(recipe) == 0
    assert losses(run_dir) == losses(runs[0])
    assert [r["step"] for r in probes_of(run_dir)] == [0, STEPS]


def test_of_two_ranks_one_is_told_to_stop_in_the_probes_before_the_first_step_and_both_do(
    shards: Path, val: str, tmp_path: Path
) -> None:
    recipe = write(tmp_path / "told.yaml", shards, val, {"at_start": True, "few_shot": []})
    run_dir = tmp_path / "told"
    script = str(ROOT / "tests/end_to_end/told_in_a_probe.py")
    run_ranks(
        2,
        [script, str(recipe)],
        timeout_seconds=240,
        folder=tmp_path,
        expect=75,
        extra={"RANK_TOLD": "1"},
    )
    assert probes_of(run_dir) == []
    assert losses(run_dir) == {}
    run_ranks(2, ["-m", "pretrain.train", str(recipe)], timeout_seconds=240, folder=tmp_path)
    assert [r["step"] for r in probes_of(run_dir)] == [0, STEPS]


@pytest.mark.parametrize(
    ("probes", "has_val", "told"),
    [
        ({}, False, "there is no data.val; name a dataset: eval.probes.val=URL"),
        ({"val": "SHARDS"}, True, "are the same dataset"),
        ({"knn": False, "few_shot": []}, True, "measures nothing"),
        ({"few_shot": [5, 5]}, True, "each once"),
        ({"val": "/nowhere"}, True, "/nowhere"),
    ],
)
def test_probes_that_can_give_no_number_are_refused_before_anything_is_written(
    shards: Path,
    val: str,
    tmp_path: Path,
    probes: dict[str, Any],
    has_val: bool,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    probes = {name: str(shards) if value == "SHARDS" else value for name, value in probes.items()}
    recipe = write(tmp_path / "wrong.yaml", shards, val if has_val else None, probes)
    assert train(recipe) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
