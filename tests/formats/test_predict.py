"""`pretrain predict`: the classes a few plain lines find, and what it says of images and networks that are none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_samples import CLASSES, MEAN, SMALL, STD, our_features, random_head, random_weights
from launching import ROOT, clean_environment
from PIL import Image

from pretrain.cli import main
from pretrain.formats.hugging_face import write_hugging_face
from pretrain.formats.timm import write_timm
from pretrain.models.spec import BackboneSpec

WITH_HEAD = BackboneSpec(**{**vars(SMALL), "num_classes": len(CLASSES), "class_names": CLASSES})


@pytest.fixture
def run_dir(make_run: Callable[..., Path]) -> Path:
    parameters = {f"backbone.{name}": value for name, value in random_weights(SMALL).items()}
    parameters |= {f"head.{name}": value for name, value in random_head(SMALL).items()}
    return make_run(SMALL, parameters, class_names=CLASSES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures of the network's size, in a folder and one below it."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(5)
    for name in ("a.png", "b.PNG", "more/c.png"):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        with (folder / name).open("wb") as file:
            Image.fromarray(pixels).save(file, format="PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def plain_scores(paths: list[Path]) -> torch.Tensor:
    """Logits, in a few lines."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    head = random_head(SMALL)
    return our_features(SMALL, random_weights(SMALL), images) @ head["weight"].T + head["bias"]


def answers(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    assert main(["predict", *map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_top_classes_are_those_of_a_plain_softmax_with_their_names(
    run_dir: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [photos / "a.png", photos / "b.PNG", photos / "more" / "c.png"]
    found = answers(capsys, run_dir, photos, "--top", 2, "--batch-size", 2)
    assert [one["image"] for one in found] == [str(path) for path in paths]
    for one, logits in zip(found, plain_scores(paths), strict=True):
        probabilities, classes = logits.softmax(-1).sort(descending=True)
        assert [top["class"] for top in one["top"]] == classes[:2].tolist()
        assert [top["name"] for top in one["top"]] == [CLASSES[c] for c in classes[:2]]
        assert [top["probability"] for top in one["top"]] == pytest.approx(
            probabilities[:2].tolist(), abs=1e-6
        )
    alone = answers(capsys, run_dir, paths[2], "--top", 9, "--scores", "sigmoid")
    by_class = {top["class"]: top["probability"] for top in alone[0]["top"]}
    assert len(by_class) == len(CLASSES)
    assert [by_class[c] for c in range(3)] == pytest.approx(
        plain_scores(paths[2:])[0].sigmoid().tolist(), abs=1e-6
    )


@pytest.mark.parametrize("write", [write_timm, write_hugging_face])
def test_exports_say_the_same_as_the_run(
    write: Callable[..., None],
    run_dir: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "export").mkdir()
    write(tmp_path / "export", random_weights(SMALL), WITH_HEAD, head=random_head(SMALL), crop_fraction=1.0)
    of_run, of_export = (
        answers(capsys, source, photos / "a.png") for source in (run_dir, tmp_path / "export")
    )
    assert [top["name"] for top in of_export[0]["top"]] == [top["name"] for top in of_run[0]["top"]]
    values = [[top["probability"] for top in found[0]["top"]] for found in (of_run, of_export)]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_a_sentence_an_image_names_its_classes(
    run_dir: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run_dir), str(photos / "*.png"), "--top", "1"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    value, best = plain_scores([photos / "a.png"])[0].softmax(-1).max(-1)
    assert line == f"{photos / 'a.png'}: {CLASSES[best]} {100 * value:.1f} %"


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_classified(
    run_dir: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "b.PNG").write_bytes((photos / "a.png").read_bytes()[:60])
    words = ["predict", str(run_dir), str(photos), str(photos / "notes.txt"), "--json"]
    assert main(words) == 3
    said = capsys.readouterr()
    lines = {Path(line["image"]).name: line for line in map(json.loads, said.out.splitlines())}
    assert {name for name, line in lines.items() if "error" in line} == {"b.PNG", "notes.txt"}
    assert {name for name, line in lines.items() if "top" in line} == {"a.png", "c.png"}
    assert f"left out: {photos / 'b.PNG'}" in said.err
    assert "2 of 4 images could not be read" in said.err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.jpg", "there is no such file or folder"),
        ("*.webp", "matches no image"),
        ("empty", "holds no images"),
    ],
)
def test_names_that_stand_for_nothing_are_refused(
    run_dir: Path, photos: Path, capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    (photos / "empty").mkdir()
    assert main(["predict", str(run_dir), str(photos / name)]) == 2
    assert f"{photos / name}: {told}" in capsys.readouterr().err


def test_a_backbone_without_a_head_is_refused(
    make_run: Callable[..., Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    headless = make_run(SMALL, {f"backbone.{name}": value for name, value in random_weights(SMALL).items()})
    assert main(["predict", str(headless), str(photos)]) == 2
    assert "has no class head" in capsys.readouterr().err


def test_neither_deepspeed_nor_a_bucket_nor_training_is_needed(run_dir: Path, photos: Path) -> None:
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "accelerate", "webdataset", "boto3", "botocore", "matplotlib"):
            raise ModuleNotFoundError(f"no {name} here")
sys.meta_path.insert(0, Absent())
from pretrain.cli import main
sys.exit(main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", script, "predict", str(run_dir), str(photos / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, env=clean_environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in CLASSES)
