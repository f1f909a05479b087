"""`pretrain evaluate`: the number it prints is the one that a few plain lines find."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_samples import MEAN, SMALL, STD, our_features, random_weights
from PIL import Image

from pretrain.cli import main
from pretrain.formats.timm import write_timm
from pretrain.metrics.journal import read_journal
from pretrain.models.build import build_backbone

TRAIN, VAL = 36, 18
HUES = np.array([[200, 90, 80], [80, 200, 90], [90, 80, 200]])


def draw(i: int, random: np.random.Generator) -> np.ndarray:
    """32 × 32 of noise around its class's colour, near enough to the others' that some are mistaken."""
    base = 128 + 0.2 * (HUES[i % 3] - 128)
    return (base + random.normal(0, 60, (32, 32, 3)) + random.normal(0, 12, 3)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two packed datasets of three classes, and their pixels in plain arrays."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    found: dict[str, Any] = {}
    for name, count in (("train", TRAIN), ("val", VAL)):
        pixels = [draw(i, random) for i in range(count)]
        for i, picture in enumerate(pixels):
            path = root / f"{name}_images" / "abc"[i % 3] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        url = str(root / name)
        assert main(["data", "pack", str(root / f"{name}_images"), url, "--chunk-samples", "5"]) == 0
        found[name], found[f"{name} pixels"] = url, np.stack(pixels)
    return found


@pytest.fixture
def run_dir(make_run: Callable[..., Path]) -> Path:
    return make_run(SMALL, {f"backbone.{name}": value for name, value in random_weights(SMALL).items()})


def evaluate(run: Path, datasets: dict[str, Any], *more: str) -> int:
    urls = ["--train", datasets["train"], "--val", datasets["val"]]
    return main(["evaluate", str(run), *urls, "--workers", "0", "--batch-size", "8", *more])


def plain_knn(datasets: dict[str, Any], weights: dict[str, torch.Tensor]) -> float:
    """DINO's vote over 20 neighbours, in a few lines."""
    features = {}
    for name in ("train", "val"):
        x = torch.from_numpy(datasets[f"{name} pixels"]).permute(0, 3, 1, 2) / 255
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        features[name] = F.normalize(our_features(SMALL, weights, x), dim=1)
    right = 0
    for i, cosine in enumerate(features["val"] @ features["train"].T):
        votes = np.zeros(3)
        for j in cosine.argsort(descending=True)[:20].tolist():
            votes[j % 3] += np.exp(cosine[j].item() / 0.07)
        right += int(votes.argmax() == i % 3)
    return right / VAL


def test_knn_gives_the_number_that_a_plain_loop_finds_and_writes_it_to_the_journal(
    run_dir: Path, datasets: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run_dir, datasets, "--probe", "knn", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    expected = plain_knn(datasets, random_weights(SMALL))
    assert 1 / 3 < expected < 1, "a number that could not be wrong proves nothing"
    assert result["top1"] == expected
    assert (result["train_samples"], result["val_samples"], result["num_classes"]) == (TRAIN, VAL, 3)
    (record,) = read_journal(run_dir / "journal.jsonl")
    assert (record["event"], record["probe"], record["top1"]) == ("probe", "knn", expected)
    assert (record["step"], record["samples"], record["attempt"], record["init"]) == (12, 96, 1, "trained")


def test_an_untrained_network_of_the_same_shape_is_the_baseline_and_named_so(
    run_dir: Path, datasets: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run_dir, datasets, "--probe", "knn", "--init", "random", "--seed", "5") == 0
    torch.manual_seed(5)
    expected = plain_knn(datasets, build_backbone(SMALL).state_dict())
    printed = capsys.readouterr().out
    assert f"untrained: knn top-1 {100 * expected:.2f} %" in printed
    assert read_journal(run_dir / "journal.jsonl")[-1]["init"] == "random"


def test_the_linear_probe_works_on_an_export_and_leaves_no_journal(
    run_dir: Path, datasets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    out.mkdir()
    write_timm(out, random_weights(SMALL), SMALL)
    results = []
    for source in (out, run_dir):
        assert evaluate(source, datasets, "--probe", "linear", "--json") == 0
        results.append(json.loads(capsys.readouterr().out)["top1"])
    assert results[0] == results[1]
    assert results[0] > 1 / 2
    assert not (out / "journal.jsonl").exists()


def test_a_limit_takes_so_many_samples_of_both(
    run_dir: Path, datasets: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run_dir, datasets, "--probe", "knn", "--limit", "11", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["train_samples"], result["val_samples"]) == (11, 11)


def test_decoding_in_processes_changes_nothing(
    run_dir: Path, datasets: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for workers in ("0", "2"):
        assert evaluate(run_dir, datasets, "--probe", "knn", "--json", "--workers", workers) == 0
        results.append(json.loads(capsys.readouterr().out)["top1"])
    assert results[0] == results[1]


def test_datasets_that_give_no_honest_number_are_refused(
    run_dir: Path, datasets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        for kind, folder in (("flat", "."), ("other", f"class{i % 2}")):
            path = tmp_path / kind / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (i * 50, 0, 0)).save(path)
    for kind in ("flat", "other"):
        assert main(["data", "pack", str(tmp_path / kind), str(tmp_path / f"{kind}_shards")]) == 0
    capsys.readouterr()
    cases = [
        ({**datasets, "val": datasets["train"]}, [], "the same dataset"),
        ({**datasets, "val": str(tmp_path / "flat_shards")}, [], "no labels"),
        ({**datasets, "val": str(tmp_path / "other_shards")}, [], "name their classes differently"),
        ({**datasets, "val": str(tmp_path / "gone")}, [], "gone"),
        (datasets, ["--batch-size", "0"], "not positive"),
    ]
    for named, more, words in cases:
        try:
            code: Any = evaluate(run_dir, named, "--probe", "knn", *more)
        except SystemExit as stopped:  # argparse
            code = stopped.code
        assert code == 2
        assert words in capsys.readouterr().err
    assert not (run_dir / "journal.jsonl").exists()
