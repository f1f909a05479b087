"""`pretrain export`: a folder that its consumer has loaded, or no folder."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backbone_samples import CLASSES, SMALL, our_features, random_head, random_weights, some_images, write_run
from PIL import Image
from safetensors.torch import load_file

from pretrain.checkpoint.manifest import read_manifest
from pretrain.cli import main
from pretrain.errors import CheckpointError, UsageError
from pretrain.export import describe
from pretrain.formats import folder
from pretrain.formats.check_images import images_for_check, textures
from pretrain.formats.files import write_tensors
from pretrain.formats.folder import Exported, export_backbone
from pretrain.formats.incoming import Source, read_backbone
from pretrain.formats.place import Place
from pretrain.models.pos_embed import resample_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.storage import open_storage

TASK = {"decoder.pred.weight": torch.ones(3), "mask_token": torch.ones(1, 1, 4)}


def parameters(spec: BackboneSpec = SMALL, *, head: bool = True) -> dict[str, torch.Tensor]:
    found = {f"backbone.{name}": value for name, value in random_weights(spec).items()}
    return {
        **found,
        **({f"head.{name}": value for name, value in random_head(spec).items()} if head else TASK),
    }


@pytest.fixture
def run_dir(make_run: Callable[..., Path]) -> Path:
    return make_run(SMALL, parameters(), class_names=CLASSES)


class Made(NamedTuple):
    format: str
    out: Path
    exported: Exported
    printed: str


@pytest.fixture(scope="module", params=["timm", "hf"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An export with classes at another image size, from a run that has more than a backbone and a head."""
    root = tmp_path_factory.mktemp(request.param)
    run = write_run(root / "run", SMALL, {**parameters(), **TASK}, class_names=CLASSES)
    out = root / "deep" / "out"
    exported = export_backbone(run, out, format=request.param, image_size=56)
    return Made(request.param, out, exported, describe(exported))


def test_an_export_with_classes_is_verified_by_its_consumer_and_says_where_it_is_from(made: Made) -> None:
    record = json.loads((made.out / "export.json").read_text("utf-8"))
    assert record["verified"] is True
    assert 0 < record["max_difference"] <= record["tolerance"] == 1e-4
    assert record["versions"].keys() == {"torch", {"timm": "timm", "hf": "transformers"}[made.format]}
    checkpoint = made.out.parents[1] / "run" / "checkpoints" / "step-00000012"
    assert record["source"] == {
        "kind": "run", "url": str(checkpoint), "step": 12, "samples": 96, "dataset_identity": "ab" * 32,
        "weights": "raw",
    }  # fmt: skip
    assert "generated textures" in record["images"]["from"]
    assert "max difference" in made.printed
    assert "head of 3 classes (tabby, café au lait, forklift)" in made.printed
    incoming = read_backbone(made.out)
    assert incoming.spec.class_names == CLASSES
    assert incoming.source.step == 12
    assert made.exported.left_out == {
        "decoder.pred.weight": "the pretraining task's decoder",
        "mask_token": "used by the pretraining task only",
    }
    assert list(made.out.parent.glob(".*")) == [], "the folder it was built in is still there"
    mask = os.umask(0)
    os.umask(mask)
    assert made.out.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in made.out.iterdir()} == {0o666 & ~mask}


def test_its_card_says_what_it_is_of_what_and_what_is_not_known(made: Made) -> None:
    card = (made.out / "README.md").read_text("utf-8")
    for words in (
        "ViT 104 wide, 2 deep, patch 8, image 56", "| Samples seen | 96 |", f"| Data index | {'ab' * 32} |",
        "| Licence | not stated |", "resampled, 4×4 to 7×7 patches", "None was recorded.", "embed_dim: 104",
        "`decoder.pred.weight`: the pretraining task's decoder", "- 0.41", "generated textures",
    ):  # fmt: skip
        assert words in card, words
    assert "/nowhere" not in card
    assert str(made.out.parents[1]) not in card


def test_of_a_run_whose_folder_is_gone_the_mirror_is_read(run_dir: Path, tmp_path: Path) -> None:
    mirror, name = tmp_path / "mirror", "step-00000012.1-1"
    shutil.copytree(run_dir / "checkpoints" / "step-00000012", mirror / "checkpoints" / name)
    path = mirror / "checkpoints" / name / "manifest.json"
    path.write_text(dataclasses.replace(read_manifest(path.parent), save_id="1-1").to_json(), "utf-8")
    (mirror / "run.json").write_text('{"id": "its own"}')
    (mirror / "journal").mkdir()
    line = {
        "event": "probe",
        "time": 1.0,
        "attempt": 1,
        "probe": "knn",
        "top1": 0.25,
        "step": 10,
        "by": "train",
    }
    (mirror / "journal" / f"{0:020d}.jsonl").write_text(json.dumps(line) + "\n")
    shutil.rmtree(run_dir)
    before = sorted(mirror.rglob("*"))
    incoming = read_backbone(mirror)
    weights = random_weights(SMALL)
    assert all(torch.equal(incoming.backbone[key], value) for key, value in weights.items())
    assert (incoming.source.kind, incoming.source.step) == ("mirror", 12)
    assert incoming.source.url == f"{mirror}/checkpoints/{name}"
    assert [(probe["probe"], probe["top1"]) for probe in incoming.source.probes] == [("knn", 0.25)]
    assert sorted(mirror.rglob("*")) == before, "a mirror is only read"


def test_a_place_in_a_bucket_is_written_whole_or_not_at_all_and_never_over_something(s3_bucket: str) -> None:
    place = Place.of(f"{s3_bucket}/exports/vit/")
    place.refuse_occupied()

    def fail() -> None:
        with place.building() as building:
            (building / "config.json").write_text("{}")
            raise ValueError("the check fails")

    with pytest.raises(ValueError, match="the check fails"):
        fail()
    assert not list(open_storage(s3_bucket).list())
    with place.building() as building:
        for name in ("config.json", "model.safetensors"):
            (building / name).write_text(name)
    assert not building.exists()
    names = {info.name for info in open_storage(place.url).list()}
    assert names == {"config.json", "model.safetensors"}
    with pytest.raises(UsageError, match="is already there"):
        place.refuse_occupied()
    with pytest.raises(UsageError, match="cannot be written"):
        Place.of(f"{s3_bucket}-gone/exports").refuse_occupied()


def test_another_image_size_is_resampled_by_the_consumers_own_rule(
    made: Made, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    assert made.exported.check.verified
    assert made.exported.resampled == "4×4 to 7×7 patches"
    weights = random_weights(SMALL)
    incoming = read_backbone(made.out)
    rule: Any = made.format
    assert torch.equal(
        incoming.backbone["pos_embed"], resample_pos_embed(weights["pos_embed"], 7, 1, rule=rule)
    )
    with_classes = {"num_classes": len(CLASSES), "class_names": CLASSES}
    assert incoming.spec == dataclasses.replace(SMALL, image_size=56, **with_classes)

    # The consumer's own way to another size, from a folder of the size that was trained.
    folder.WRITERS[rule](tmp_path, weights, SMALL)
    images = some_images(56)
    script = {
        "timm": """
import timm
model = timm.create_model("local-dir:" + FOLDER, pretrained=True, img_size=56).eval()
out["features"] = model(given["images"])
""",
        "hf": """
from transformers import AutoModel
model = AutoModel.from_pretrained(FOLDER).eval()
out["features"] = model(given["images"], interpolate_pos_encoding=True).pooler_output
""",
    }[made.format]
    out, _ = consume(f"FOLDER = {str(tmp_path)!r}\n{script}", {"images": images})
    ours = our_features(incoming.spec, incoming.backbone, images)
    torch.testing.assert_close(out["features"], ours, atol=1e-4, rtol=0)


def test_a_folder_whose_weights_are_not_the_checkpoints_fails_its_check(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_slightly_other(out: Path, weights: dict[str, torch.Tensor], *rest: Any, **options: Any) -> None:
        other = {**weights, "blocks.0.mlp.fc1.bias": weights["blocks.0.mlp.fc1.bias"] + 0.01}
        folder.write_timm(out, other, *rest, **options)

    monkeypatch.setitem(folder.WRITERS, "timm", write_slightly_other)
    with pytest.raises(CheckpointError, match="differ by up to"):
        export_backbone(run_dir, tmp_path / "out", format="timm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_lost_something_on_the_way_fails_its_check_with_every_loss_named(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_less(out: Path, weights: dict[str, torch.Tensor], spec: BackboneSpec, **options: Any) -> None:
        poorer = dataclasses.replace(spec, class_names=None, mean=(0.5, 0.5, 0.5))
        folder.write_hugging_face(out, weights, poorer, **options)
        tensors = load_file(out / "model.safetensors")
        del tensors["vit.layernorm.weight"]
        write_tensors(out / "model.safetensors", tensors)

    monkeypatch.setitem(folder.WRITERS, "hf", write_less)
    with pytest.raises(CheckpointError) as caught:
        export_backbone(run_dir, tmp_path / "out", format="hf")
    for words in ("missing ['vit.layernorm.weight']", "class names that arrived", "mean [0.5, 0.5, 0.5]"):
        assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.fixture
def without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm cannot be imported by processes that this one starts."""
    blocked = tmp_path / "without_timm"
    blocked.mkdir()
    (blocked / "timm.py").write_text("raise ImportError('No module named timm, says the test')")
    monkeypatch.setenv("PYTHONPATH", f"{blocked}:{Path.cwd()}")


def test_an_average_pooled_head_is_refused_for_transformers_and_goes_without_it(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = dataclasses.replace(SMALL, pooling="avg")
    run, out = make_run(spec, parameters(spec), class_names=CLASSES), tmp_path / "out"
    assert main(["export", str(run), str(out), "--format", "hf"]) == 2
    assert "--no-head" in capsys.readouterr().err
    assert not out.exists()
    assert main(["export", str(run), str(out), "--format", "hf", "--no-head"]) == 0
    assert "head.weight, head.bias: --no-head" in capsys.readouterr().out
    assert read_backbone(out).head == {}


@pytest.mark.parametrize("occupied", ["a file", "a full folder"])
def test_an_out_that_holds_something_is_refused_and_left_alone(
    occupied: str, run_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mine = out if occupied == "a file" else out / "thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UsageError, match="is already there"):
        export_backbone(run_dir, out, format="timm")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--image-size", "50"], 2, "not a multiple of the patch size 8; take 48"),
        (["--image-size", "0"], 2, "take 8"),
        (["--images", "/nowhere/at/all"], 2, "/nowhere/at/all"),
    ],
)
def test_wrong_arguments_end_with_code_2_and_write_nothing(
    arguments: list[str],
    code: int,
    words: str,
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--format", "timm", *arguments]) == code
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_place_that_cannot_be_written_is_wrong_usage(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main(["export", str(run_dir), str(tmp_path / "file" / "out"), "--format", "timm"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_damaged_checkpoint_ends_with_code_4_and_writes_nothing(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = run_dir.glob("checkpoints/*/rank-*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-64])
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--format", "timm"]) == 4
    assert "rank-00000.safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_checks_images_are_the_runs_own_when_they_can_be_reached(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images, shards = tmp_path / "images", tmp_path / "shards"
    for i in range(12):
        path = images / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    assert main(["data", "pack", str(images), str(shards), "--chunk-samples", "4"]) == 0
    source = Source(
        kind="run", url="", config={"data": {"train": str(shards), "val": str(tmp_path / "gone")}}
    )
    chosen = images_for_check(SMALL, source)
    assert chosen.origin == str(shards)
    assert chosen.images.shape == (4, 3, 32, 32)
    assert (chosen.images[0] - chosen.images[1]).abs().max() > 0.5
    assert chosen.crop_fraction == 0.875  # the longer side is above the network's
    assert images_for_check(dataclasses.replace(SMALL, image_size=40), source).crop_fraction == 1.0


def test_generated_textures_are_the_same_every_time_and_unlike_each_other() -> None:
    first, second = textures(4, 48), textures(4, 48)
    assert torch.equal(first, second)
    assert len({picture.numpy().tobytes() for picture in first}) == 4
    assert first.float().std(dim=(2, 3)).min() > 10


@pytest.mark.usefixtures("without_timm")
def test_exporting_needs_no_deepspeed_webdataset_or_boto3_and_without_timm_says_it_is_unverified(
    run_dir: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
for name in ("deepspeed", "webdataset", "boto3", "botocore", "accelerate"):
    sys.modules[name] = None  # any import of it fails
from pretrain.checkpoint.manifest import read_manifest
from pretrain.cli import main
sys.exit(main(["export", {str(run_dir)!r}, {str(tmp_path / "out")!r}, "--format", "timm"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    record = json.loads((tmp_path / "out" / "export.json").read_text("utf-8"))
    assert (record["verified"], record["max_difference"]) == (False, None)
    assert "No module named timm" in record["notice"]
    assert "not verified: timm cannot be imported" in done.stdout
