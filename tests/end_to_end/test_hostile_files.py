"""Files that would run code if anybody unpickled them, in every place where a run or a model is read from."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_rows import Result, Row, check, run_rows
from small_run import RECIPE, pretrain
from wrong_things import Hostile

from pretrain.checkpoint.manifest import _digest

STEP = "checkpoints/step-00000003"
FIRST = "train {recipe} run_dir={root}/"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, object]:
    """{root} holds the runs and models that the rows name, each with one hostile file."""
    root = tmp_path_factory.mktemp("hostile")
    recipe = root / "recipe.yaml"
    sections = {
        **RECIPE,
        "data": {**RECIPE["data"], "train": str(shards), "workers": 0, "cache_dir": str(root / "cache")},
        "train": {**RECIPE["train"], "steps": 3},
        "run_dir": str(root / "sound"),
    }
    recipe.write_text(yaml.safe_dump(sections))
    done = pretrain("train", str(recipe))
    assert done.returncode == 0, done.stderr
    (root / "sound" / "finished.json").unlink()

    bare = pickle.dumps(Hostile(root / "PWNED"))
    torch.save({"model": Hostile(root / "PWNED")}, root / "zip.pt")  # what torch.load would open
    zipped = (root / "zip.pt").read_bytes()

    def run(name: str) -> Path:
        shutil.copytree(root / "sound", root / name)
        return root / name

    (run("bare-slices") / STEP / "rank-00000.safetensors").write_bytes(bare)
    (run("zip-slices") / STEP / "rank-00000.safetensors").write_bytes(zipped)
    (run("manifest") / STEP / "manifest.json").write_bytes(bare)
    (run("finished") / "finished.json").write_bytes(bare)
    (run("segments") / "segments.json").write_bytes(bare)
    (run("tracking") / "tracking.json").write_bytes(bare)
    (run("lineage") / "lineage.json").write_bytes(bare)
    (run("journal") / "journal.jsonl").write_bytes(bare + b"\n{}\n")

    # A manifest that says of itself that it is whole, and names a pickle as its file, here and elsewhere.
    for name, file in (("pickle-named", "rank-00000.pt"), ("elsewhere", "../../../zip.pt")):
        folder = run(name) / STEP
        shutil.copyfile(root / "zip.pt", folder / "rank-00000.pt")
        body = json.loads((folder / "manifest.json").read_text())
        body["files"] = {file: body["files"]["rank-00000.safetensors"]}
        body["sha256"] = _digest(body)
        (folder / "manifest.json").write_text(json.dumps(body))

    # What other trainers leave: it is no checkpoint of ours, and not looked into.
    deepspeed = run("deepspeed") / "checkpoints" / "global_step9"
    deepspeed.mkdir()
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        shutil.copyfile(root / "zip.pt", deepspeed / name)
    (deepspeed.parent / "latest").write_text("global_step9")

    for name, file, data in (
        ("export-bin", "pytorch_model.bin", zipped),
        ("export-safetensors", "model.safetensors", zipped),
    ):
        (root / name).mkdir()
        (root / name / file).write_bytes(data)
        (root / name / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    (root / "export-config").mkdir()
    (root / "export-config" / "config.json").write_bytes(bare)
    (root / "export-config" / "model.safetensors").write_bytes(bare)
    for suffix in ("pth", "bin", "ckpt", "npz", "safetensors"):
        (root / f"init.{suffix}").write_bytes(zipped)
    shutil.copytree(shards, root / "shards")
    (root / "shards" / "index.safetensors").write_bytes(bare)
    (root / "hostile.yaml").write_text(f"run_dir: !!python/object/apply:os.mkdir [{root / 'PWNED'}]\n")
    return {"root": root, "recipe": recipe}


def init(what: str, code: int, *says: str) -> Row:
    return Row(command=f"train {{recipe}} run_dir={{new}} init_from={{root}}/{what}", code=code, says=says)


ROWS = {
    **{
        f"init_from a .{suffix}": init(f"init.{suffix}", 2, "is a pickle, which can run any code")
        for suffix in ("pth", "bin", "ckpt", "npz")
    },
    "init_from a zip called safetensors": init("init.safetensors", 4, "is not a whole safetensors file"),
    "init_from a folder of a .bin": init("export-bin", 2, "no model.safetensors"),
    "init_from a folder of a zip called safetensors": init(
        "export-safetensors", 4, "not a whole safetensors"
    ),
    "init_from a folder whose config is a pickle": init("export-config", 4, "config.json"),
    "init_from a run": init("zip-slices", 4, "cannot be read"),
    "slices that are a pickle": Row(
        command=f"{FIRST}bare-slices train.steps=5",
        code=4,
        says=("none of its 1 checkpoints can be trusted",),
    ),
    "slices that are a zip": Row(
        command=f"{FIRST}zip-slices train.steps=5", code=4, says=("none of its 1 checkpoints can be trusted",)
    ),
    "a manifest that is a pickle": Row(
        command=f"{FIRST}manifest train.steps=5", code=4, says=("manifest.json: cannot be read",)
    ),
    "a manifest that names a pickle": Row(
        command=f"{FIRST}pickle-named train.steps=5", code=4, says=("rank-00000.pt: cannot be read",)
    ),
    "a manifest that names a pickle elsewhere": Row(
        command=f"{FIRST}elsewhere train.steps=5", code=4, says=("none of its 1 checkpoints can be trusted",)
    ),
    "a fork of what names a pickle elsewhere": Row(
        command="fork {root}/elsewhere {new} train.steps=5", code=4, says=("which is no file of the folder",)
    ),
    "a fork of slices that are a zip": Row(
        command="fork {root}/zip-slices {new} train.steps=5", code=4, says=("the file is damaged",)
    ),
    "an end that is a pickle": Row(command=f"{FIRST}finished", code=2, says=("finished.json is damaged",)),
    "segments that are a pickle": Row(
        command=f"{FIRST}segments train.steps=5", code=4, says=("segments.json: cannot be read",)
    ),
    "a tracking id that is a pickle": Row(
        command=f"{FIRST}tracking train.steps=5 'metrics.wandb={{{{project: p, mode: offline}}}}'",
        code=2,
        says=("tracking.json is damaged",),
    ),
    "a lineage that is a pickle": Row(
        command="compare {root}/sound {root}/lineage", code=4, says=("lineage.json: cannot be read",)
    ),
    "a journal that is a pickle": Row(
        command="compare {root}/sound {root}/journal", code=3, says=("journal.jsonl: line 1 is damaged",)
    ),
    "another trainer's checkpoint beside ours": Row(
        command=f"{FIRST}deepspeed train.steps=5",
        code=0,
        says=("going on at step 3 of 5", "finished at step 5"),
    ),
    "an index that is a pickle": Row(
        command="train {recipe} run_dir={new} data.train={root}/shards", code=3, says=("index.safetensors",)
    ),
    "a recipe that makes an object": Row(
        command="train {root}/hostile.yaml", code=2, says=("is not valid YAML", "python/object/apply")
    ),
    "an export of slices that are a zip": Row(
        command="export {root}/zip-slices {new} --format timm", code=4, says=("cannot be read",)
    ),
}


@pytest.fixture(scope="module")
def results(names: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_rows(ROWS, names, tmp_path_factory.mktemp("logs"))


@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused_or_left_alone(name: str, results: dict[str, Result]) -> None:
    check(ROWS[name], results[name])


def test_none_of_them_was_run_and_each_would_have_been(
    names: dict[str, object], results: dict[str, Result]
) -> None:
    marker = Path(str(names["root"])) / "PWNED"
    assert not marker.exists()
    for opened in (
        lambda: torch.load(marker.parent / "zip.pt", weights_only=False),
        lambda: pickle.loads((marker.parent / "manifest" / STEP / "manifest.json").read_bytes()),
        lambda: yaml.unsafe_load((marker.parent / "hostile.yaml").read_text()),
    ):
        opened()
        assert marker.is_dir(), "it is hostile"
        marker.rmdir()
