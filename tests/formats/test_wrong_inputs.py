"""Damaged and wrong inputs of an export and of `init_from`: a clear error each, nothing half written or half loaded."""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backbone_samples import CLASSES, SMALL, random_head, random_weights, write_run
from safetensors.torch import load_file, save_file

from pretrain.cli import main
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.formats.folder import WRITERS
from pretrain.formats.incoming import read_backbone

HEADED = dataclasses.replace(SMALL, num_classes=len(CLASSES), class_names=CLASSES)


class Case(NamedTuple):
    source: str  # what it is a damaged one of: timm, hf, safetensors (exports), run, or nothing
    damage: Callable[[Path], Path | None]  # returns what is given instead of the folder
    code: int
    words: str


class Hostile:
    """What it is unpickled with leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def hostile(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"model": Hostile(path.parent / "executed")}))
    return path


def weights_of(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    save_file(tensors, path)


def config_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    change(config)
    path.write_text(json.dumps(config), "utf-8")


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def shard(run: Path) -> Path:
    return next(run.glob("checkpoints/*/rank-*.safetensors"))


def flip_in_weights(run: Path) -> None:
    content = bytearray(shard(run).read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 1] ^= 1
    shard(run).write_bytes(content)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def other_config(folder: Path) -> None:
    """The config of another model's export beside these tensors."""
    config_of(folder, lambda c: c["model_args"].update(depth=3))


def run_of_another_model(run: Path) -> None:
    """A checkpoint whose recipe was edited, and whose manifest therefore no longer hashes to itself."""
    path = next(run.glob("checkpoints/*/manifest.json"))
    path.write_text(path.read_text("utf-8").replace('"depth": 2', '"depth": 3'), "utf-8")


CASES = {
    "a place where nothing is": Case("nothing", lambda f: f / "gone", 2, "no such file or folder"),
    "an empty folder": Case("nothing", lambda f: None, 2, "holds neither a run's checkpoints nor an export"),
    "a text file": Case("nothing", lambda f: written(f / "notes.txt", "no weights"), 4, "not a whole safetensors"),
    "a text file that is named like weights": Case(
        "nothing", lambda f: written(f / "vit.safetensors", "no weights" * 9), 4, "not a whole safetensors"
    ),
    "an empty file": Case("nothing", lambda f: written(f / "vit.safetensors", b""), 4, "not a whole safetensors"),
    "a header longer than its file": Case(
        "nothing", lambda f: written(f / "vit.safetensors", b"\xff" * 64), 4, "not a whole safetensors"
    ),
    "tensors of a convolutional network": Case(
        "nothing",
        lambda f: save_file({"layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}, f / "r.safetensors")
        or f / "r.safetensors",
        4, "holds no vision transformer",
    ),
    "a hostile pickle": Case("nothing", lambda f: hostile(f / "vit.pth"), 2, "is a pickle, which can run any code"),
    "a hostile pickle of Lightning's": Case("nothing", lambda f: hostile(f / "last.ckpt"), 2, "is a pickle"),
    "a hostile pickle that is named like weights": Case(
        "nothing", lambda f: hostile(f / "vit.safetensors"), 4, "not a whole safetensors"
    ),
    "an export with a hostile pickle for its weights": Case(
        "timm", lambda f: hostile(f / "model.safetensors") and None, 4, "not a whole safetensors"
    ),
    "an export cut in its header": Case(
        "safetensors", lambda f: cut(f / "model.safetensors", 0.001), 4, "not a whole safetensors"
    ),
    "an export cut in its tensors": Case(
        "hf", lambda f: cut(f / "model.safetensors", 0.9), 4, "not a whole safetensors"
    ),
    "a missing tensor": Case(
        "timm", lambda f: weights_of(f, lambda t: t.pop("blocks.1.mlp.fc2.bias")), 4, "missing: blocks.1.mlp.fc2.bias"
    ),
    "a missing key's projection": Case(
        "hf",
        lambda f: weights_of(f, lambda t: t.pop("vit.encoder.layer.0.attention.attention.key.weight")),
        4, "missing: blocks.0.attn.qkv.weight",
    ),
    "a tensor too many": Case(
        "safetensors", lambda f: weights_of(f, lambda t: t.update({"blocks.0.ls1.gamma": torch.ones(104)})),
        4, "no place for: blocks.0.ls1.gamma",
    ),
    "a tensor of another shape": Case(
        "safetensors", lambda f: weights_of(f, lambda t: t.update(pos_embed=torch.zeros(1, 10, 104))),
        4, "wrong shape: pos_embed is (1, 10, 104), not (1, 17, 104)",
    ),
    "a head of other classes": Case(
        "timm", lambda f: weights_of(f, lambda t: t.update({"head.bias": torch.zeros(9)})),
        4, "head.bias is (9,), not (3,)",
    ),
    "another model's export": Case("timm", other_config, 4, "missing: blocks.2.norm1.weight"),
    "another architecture": Case(
        "hf", lambda f: config_of(f, lambda c: c.update(model_type="dinov2")), 4, "another model than ours"
    ),
    "a timm folder of a network that is not here": Case(
        "timm", lambda f: config_of(f, lambda c: [c.pop("model_args"), c.update(architecture="beit_base")]),
        4, "architecture beit_base is no backbone of ours",
    ),
    "a config that is not JSON": Case("hf", lambda f: written(f / "config.json", "{vit") and None, 4, "is not JSON"),
    "a config that is a list": Case("hf", lambda f: written(f / "config.json", "[]") and None, 4, "a JSON list"),
    "a config of nothing known": Case(
        "timm", lambda f: written(f / "config.json", "{}") and None, 4, "it names no architecture"
    ),
    "a config that contradicts itself": Case(
        "safetensors", lambda f: config_of(f, lambda c: c["backbone"].update(num_heads=7)),
        4, "embed_dim 104 is not a multiple of num_heads 7",
    ),
    "a config of a later version": Case(
        "safetensors", lambda f: config_of(f, lambda c: c.update(format_version=9)), 4, "format_version 9"
    ),
    "an export without its config": Case("timm", lambda f: (f / "config.json").unlink(), 2, "no config.json"),
    "an export without its weights": Case("hf", lambda f: (f / "model.safetensors").unlink(), 2, "no model.saf"),
    "a run that has saved nothing": Case(
        "run", lambda f: shutil.rmtree(next(f.glob("checkpoints/*"))), 4, "holds no checkpoint"
    ),
    "a checkpoint that was cut": Case("run", lambda f: cut(shard(f), 0.9), 4, "cannot be read"),
    "a checkpoint without a rank's file": Case("run", lambda f: shard(f).unlink(), 4, "cannot be read"),
    "a checkpoint with a flipped bit": Case("run", flip_in_weights, 4, "the manifest says"),
    "a checkpoint whose recipe was edited": Case("run", run_of_another_model, 4, "its sha256 is"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind, undamaged."""
    root = tmp_path_factory.mktemp("sound")
    weights, head = random_weights(SMALL), random_head(SMALL)
    for format, write in WRITERS.items():
        (root / format).mkdir()
        write(root / format, weights, HEADED, head=head)
    parameters = {f"backbone.{name}": value for name, value in weights.items()}
    parameters |= {f"head.{name}": value for name, value in head.items()}
    write_run(root / "run", SMALL, parameters, class_names=CLASSES)
    (root / "nothing").mkdir()
    for name in ("timm", "hf", "safetensors", "run"):
        assert len(read_backbone(root / name).backbone) == len(weights), "the sound one is not read either"
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_input_is_refused_with_its_reason_and_leaves_nothing_behind(
    name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    folder = tmp_path / case.source
    shutil.copytree(sound / case.source, folder)
    given = case.damage(folder) or folder
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "out"

    assert main(["export", str(given), str(out), "--format", "safetensors"]) == case.code
    said = capsys.readouterr().err.strip()
    assert case.words in said
    assert str(folder) in said
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before, "something was written, or run"

    with pytest.raises(PretrainError) as caught:  # what init_from calls before a model is built
        read_backbone(given)
    assert isinstance(caught.value, {2: UsageError, 4: CheckpointError}[case.code])
