"""What a run begins with, of init_from: the backbone, and the class head where init_head asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small_run import RECIPE, train

from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed
from pretrain.cli import main
from pretrain.data.index import open_index
from pretrain.formats.folder import WRITERS
from pretrain.formats.incoming import Incoming, read_backbone
from pretrain.metrics.journal import read_journal

CLASSES = 6  # of the shards
SOURCES = ("run", "checkpoint", "timm", "hf", "safetensors folder", "safetensors file", "pth")
# So that nothing of a head moves: what is added is lost in rounding.
STILL = ("optim.head_lr_scale=1e-30", "train.steps=1")


def write_recipe(path: Path, shards: Path, **more: Any) -> Path:
    data = {**RECIPE["data"], "train": str(shards), "workers": 0}
    path.write_text(yaml.safe_dump({**RECIPE, "run_dir": str(path.with_suffix("")), "data": data, **more}))
    return path


def weights_of(run_dir: Path) -> Mapping[str, torch.Tensor]:
    return load_weights(committed(run_dir)[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("trained")
    assert train(write_recipe(root / "run.yaml", shards), "train.steps=3", "optim.lr=0.01") == 0
    return root / "run"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Callable[[str], str]:
    """The same network in every form that init_from takes."""
    root = tmp_path_factory.mktemp("sources")
    incoming = read_backbone(trained)
    tensors = {**incoming.backbone, **{f"head.{name}": value for name, value in incoming.head.items()}}

    def place_of(what: str) -> str:
        out = root / what.replace(" ", "-")
        if what == "run":
            return str(trained)
        if what == "checkpoint":
            return str(committed(trained)[-1])
        if what == "safetensors file":
            save_file(tensors, out.with_suffix(".safetensors"))
            return str(out.with_suffix(".safetensors"))
        if what == "pth":
            torch.save({"model": tensors}, out.with_suffix(".pth"))
            return str(out.with_suffix(".pth"))
        write_export(out, incoming, what.split()[0])
        return str(out)

    return place_of


def write_export(out: Path, incoming: Incoming, form: str, *, head: bool = True) -> None:
    out.mkdir(exist_ok=True)
    WRITERS[form](out, incoming.backbone, incoming.spec, head=incoming.head if head else None)


@pytest.mark.parametrize("what", SOURCES)
def test_the_class_head_comes_along_bitwise_where_it_is_asked_for(
    what: str, source: Callable[[str], str], trained: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "tuned.yaml", shards, init_from=source(what), seed=99)
    trust = ("init_trust_pickle=true",) if what == "pth" else ()
    assert train(recipe, *STILL, *trust, "init_head=true") == 0
    before, after = weights_of(trained), weights_of(tmp_path / "tuned")
    for name in ("head.weight", "head.bias"):
        assert before[name].abs().max() > 0
        assert torch.equal(after[name], before[name]), name
    [told] = [
        line["report"] for line in read_journal(tmp_path / "tuned/journal.jsonl") if line["event"] == "init"
    ]
    assert "head" not in told, "loaded, so neither new nor ignored"

    assert train(recipe, *STILL, *trust, f"run_dir={tmp_path / 'new'}") == 0
    assert not torch.equal(weights_of(tmp_path / "new")["head.weight"], before["head.weight"])


def test_the_class_head_is_put_in_the_order_of_the_data_s_class_names(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    names = open_index(str(shards)).class_names
    assert names is not None
    assert len(names) == CLASSES
    turned = tmp_path / "turned"
    turned.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, turned)
    (tmp_path / "names.txt").write_text("\n".join(reversed(names)))
    assert main(["data", "index", str(turned), "--class-names", str(tmp_path / "names.txt")]) == 0
    recipe = write_recipe(tmp_path / "tuned.yaml", turned, init_from=str(trained), init_head=True)
    assert train(recipe, *STILL) == 0
    before, after = weights_of(trained), weights_of(tmp_path / "tuned")
    for name in ("head.weight", "head.bias"):
        assert torch.equal(after[name], before[name].flip(0)), name


def test_replay_begins_with_the_head_that_the_run_began_with(
    trained: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "tuned.yaml", shards, init_from=str(trained), init_head=True)
    run = tmp_path / "tuned"
    assert train(recipe, "train.steps=1") == 0
    assert main(["replay", str(run), "--step", "1"]) == 0
    replayed = json.loads((run / "replays/step-1/replay.json").read_text())
    assert replayed["weights"] == f"the run's first weights, from {trained}"
    assert replayed["loss"] == pytest.approx(replayed["journal"]["loss"], rel=1e-5)


def test_a_head_of_other_classes_and_a_source_without_one_are_refused_and_nothing_is_written(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    headless = tmp_path / "headless"
    write_export(headless, read_backbone(trained), "timm", head=False)
    masked = write_recipe(
        tmp_path / "masked.yaml", shards, objective={"name": "mae", "decoder_dim": 16, "decoder_heads": 2}
    )
    assert train(masked, "train.steps=1") == 0
    recipe = write_recipe(tmp_path / "refused.yaml", shards, init_head=True)
    capsys.readouterr()
    for init_from, more, told in (
        (trained, ["objective.num_classes=9"], f"a class head of {CLASSES} classes, and this run has 9"),
        (headless, [], "holds no class head, and init_head=true asks for it; leave init_head out"),
        (tmp_path / "masked", [], "holds no class head"),
    ):
        assert train(recipe, f"init_from={init_from}", *more) == 4
        assert told in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


def test_a_run_that_begins_with_itself_is_refused_and_a_fine_tuning_goes_on_whatever_became_of_its_source(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(trained.rglob("*"))
    recipe = write_recipe(tmp_path / "tuned.yaml", shards, init_from=str(trained), init_head=True)
    assert train(recipe, f"run_dir={trained}") == 2
    assert "is of the run's own run_dir" in capsys.readouterr().err
    assert sorted(trained.rglob("*")) == before

    assert train(recipe, "train.steps=2") == 0
    assert train(recipe, "train.steps=3", f"init_from={tmp_path / 'gone'}") == 0
    said = capsys.readouterr()
    assert "going on at step 2 of 3" in said.out + said.err
    assert "init_from is ignored, the run has a checkpoint of its own" in said.out + said.err
