"""Forks: what they begin with is their parent's, bit for bit; what does not fit is refused and leaves nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_rows import Result, Row, check, run_rows
from launching import ROOT, clean_environment
from small_run import RECIPE, losses
from wrong_things import members_of, write_tar

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.distrusted import Distrusted, write_distrusted
from pretrain.checkpoint.lineage import read_lineage
from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.cli import main
from pretrain.data.index import open_index, open_samples
from pretrain.metrics.journal import read_journal

STEP_6 = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, object]:
    root = tmp_path_factory.mktemp("forks")
    sections = {
        **RECIPE,
        "data": {**RECIPE["data"], "train": str(shards), "workers": 0, "cache_dir": str(root / "cache")},
        "run_dir": str(root / "a"),
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(sections))
    table = open_samples(open_index(str(shards)))
    (root / "keys.txt").write_text("".join(f"{table.key(i)}\n" for i in (3, 50, 120)))
    write_tar(root / "other" / "0.tar", members_of(shards / "000000.tar")[:100])
    return {"root": root, "recipe": root / "recipe.yaml", "shards": shards}


ROWS = {
    "the parent": Row(command="train {recipe}", code=0, says=("finished at step 12",)),
    "a fork that changes nothing": Row(
        command="fork {root}/a@6 {root}/same",
        code=0,
        says=("step 6 (96 samples), to 12", "start it: pretrain train"),
    ),
    "and goes on": Row(command="train {root}/same/config.yaml", code=0, says=("going on at step 6 of 12",)),
    "a fork that is only looked at": Row(
        command="fork {root}/a {root}/looked-at train.steps=20 --dry-run",
        code=0,
        says=(
            "/a/checkpoints/step-00000012, step 12 (192 samples), to 20",
            "train.steps: 12 -> 20",
            "nothing was written",
        ),
    ),
    "a resume that is only looked at": Row(
        command="train {recipe} train.steps=20 seed=4 --dry-run",
        code=0,
        says=(
            "from step 12 (192 samples) of run_dir",
            "would be refused           seed: 3 in the checkpoint, 4 now",
            "changed since              train.steps: 12 -> 20",
        ),
    ),
    "a cooldown": Row(
        command="fork {root}/a@6 {root}/cool train.steps=10 optim.schedule=constant optim.cooldown_steps=4 "
        "optim.lr=4e-4",
        code=0,
        says=("optim.lr: 0.001 -> 0.0004", "learning rate of its first step: 0.0004"),
    ),
    "and goes on from there": Row(
        command="train {root}/cool/config.yaml",
        code=0,
        says=("changed since the checkpoint:", "optim.cooldown_steps: 0 -> 4", "finished at step 10"),
    ),
    "a fork of a fork": Row(
        command="fork {root}/cool {root}/grandchild train.steps=11", code=0, says=("to 11",)
    ),
    # the parent's data is changed: the fork consumes what the parent does
    "other data for the parent": Row(
        command="data-change {root}/a --exclude {root}/keys.txt",
        code=0,
        says=("from sample 192 on", "3 samples excluded"),
    ),
    "the parent goes on with it": Row(
        command="train {recipe} train.steps=15", code=0, says=("finished at step 15",)
    ),
    "a fork of what it consumed then": Row(
        command="fork {root}/a@12 {root}/changed", code=2, says=("would end at",)
    ),
    "a longer one": Row(command="fork {root}/a@12 {root}/changed train.steps=15", code=0, says=("to 15",)),
    "and goes on with it, too": Row(
        command="train {root}/changed/config.yaml", code=0, says=("finished at step 15",)
    ),
    # refused
    "a step that is not there": Row(
        command="fork {root}/a@7 {root}/no",
        code=2,
        says=("has no checkpoint of step 7; it has those of 3, 6, 9, 12",),
    ),
    "a run that is not there": Row(
        command="fork {root}/nowhere {root}/no", code=2, says=("there is no checkpoint in it",)
    ),
    "a folder that is there": Row(
        command="fork {root}/a {root}/same train.steps=20",
        code=2,
        says=("is there already; a fork begins in a folder",),
    ),
    "another seed and another network": Row(
        command="fork {root}/a@6 {root}/no seed=4 model.embed_dim=48 optim.lr=1e-4",
        code=4,
        says=(
            "cannot be forked so; leave these as they are",
            "  seed: 3 in the checkpoint, 4 now",
            "  model.embed_dim: 24 in the checkpoint, 48 now",
        ),
    ),
    "an index of other data": Row(command="data index {root}/other", code=0, says=()),
    "other data": Row(
        command="fork {root}/a@6 {root}/no data.train={root}/other",
        code=4,
        says=("is of another run", "  dataset: "),
    ),
    "a batch that does not fit": Row(
        command="fork {root}/a@6 {root}/no train.global_batch_size=24",
        code=4,
        says=("does not fit the run's order",),
    ),
    "an unknown key": Row(
        command="fork {root}/a@6 {root}/no optim.rate=1", code=2, says=("unknown key optim.rate",)
    ),
    "a run_dir beside NEW": Row(
        command="fork {root}/a@6 {root}/no run_dir=x",
        code=2,
        says=("run_dir: a fork's is NEW; leave it out",),
    ),
    "a damaged checkpoint": Row(
        before="cp -r {root}/a {root}/damaged && printf XXXX | dd of={root}/damaged/"
        f"{STEP_6}/rank-00000.safetensors bs=1 seek=20000 conv=notrunc status=none",
        command="fork {root}/damaged@6 {root}/no",
        code=4,
        says=("step-00000006/rank-00000.safetensors: ", "take an older checkpoint"),
    ),
    "a fork that was killed": Row(
        before="mkdir {root}/.no.forking",
        command="fork {root}/a {root}/no train.steps=20",
        code=2,
        says=("another fork is under way, or was killed",),
    ),
}


@pytest.fixture(scope="module")
def results(names: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_rows(ROWS, names, tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def root(names: dict[str, object], results: dict[str, Result]) -> Path:
    return Path(str(names["root"]))


@pytest.mark.parametrize("name", ROWS)
def test_it_ends_with_its_code_and_says(name: str, results: dict[str, Result]) -> None:
    check(ROWS[name], results[name])


@pytest.mark.parametrize(("fork", "steps"), [("same", range(7, 13)), ("changed", range(13, 16))])
def test_a_fork_that_changes_nothing_is_its_parent_bit_for_bit_also_after_the_data_was_changed(
    root: Path, fork: str, steps: range
) -> None:
    expected = losses(root / "a")
    assert losses(root / fork) == {step: expected[step] for step in steps}
    last = f"checkpoints/step-{steps[-1]:08d}"
    weights, got = load_weights(root / "a" / last), load_weights(root / fork / last)
    assert weights.keys() == got.keys()
    for name, weight in weights.items():
        assert torch.equal(got[name], weight), name


def test_a_cooldown_begins_with_the_parents_state_and_goes_straight_down(root: Path) -> None:
    journal = [r for r in read_journal(root / "cool" / "journal.jsonl") if r["event"] == "step"]
    assert [record["lr"] for record in journal] == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])
    parents, own = losses(root / "a"), losses(root / "cool")
    assert own[7] == parents[7], "the same weights on the same batch"
    assert own[8] != parents[8]


def test_where_a_fork_is_from_stands_in_its_folder_and_in_its_journal(root: Path) -> None:
    lineage = read_lineage(root / "cool")
    manifest = root / "a" / STEP_6 / "manifest.json"
    assert (lineage.parent, lineage.checkpoint) == (str(root / "a"), "step-00000006")
    assert (lineage.step, lineage.samples, lineage.ancestors) == (6, 96, [])
    assert lineage.manifest_sha256 == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert lineage.changed["optim.lr"] == {"before": 1e-3, "now": 4e-4}
    journal = read_journal(root / "cool" / "journal.jsonl")
    fork = next(record for record in journal if record["event"] == "fork")
    assert (fork["parent"], fork["step"], fork["changed"]) == (lineage.parent, 6, lineage.changed)
    changed = next(record for record in journal if record["event"] == "config_changed")
    assert changed["changed"] == lineage.changed
    grandchild = read_lineage(root / "grandchild")
    assert grandchild.parent == str(root / "cool")
    assert [ancestor["parent"] for ancestor in grandchild.ancestors] == [str(root / "a")]


def test_an_audit_of_a_fork_knows_what_its_parent_consumed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def audit(run: Path) -> list[dict]:
        assert main(["order", str(run), "--audit", str(root / "keys.txt")]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    whole, fork = audit(root / "a"), audit(root / "changed")
    assert fork[1:] == whole[1:]
    assert {line["event"] for line in fork if "key" in line} >= {"seen", "excluded"}


def test_a_fork_leaves_its_parent_alone_and_a_refused_one_leaves_nothing(root: Path) -> None:
    assert {path.name for path in committed(root / "a")} == {f"step-{s:08d}" for s in (3, 6, 9, 12, 15)}
    assert not (root / "looked-at").exists()
    assert not (root / "no").exists()
    assert [path.name for path in root.glob(".*.forking")] == [".no.forking"], "the one that was put there"
    copied, original = (root / run / STEP_6 for run in ("same", "a"))
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == {
        p.name: p.read_bytes() for p in original.iterdir()
    }
    assert read_manifest(find_newest(root / "same")).attempt == 1


def test_a_checkpoint_of_a_version_that_knew_fewer_keys_is_forked_as_it_is_resumed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older"
    shutil.copytree(root / "a", older)
    manifest = read_manifest(older / STEP_6)
    config = {
        name: dict(value) if isinstance(value, dict) else value for name, value in manifest.config.items()
    }
    for section, key in (("model", "qk_norm"), ("objective", "loss"), ("optim", "ema_decay")):
        del config[section][key]
    (older / STEP_6 / "manifest.json").write_text(replace(manifest, config=config).to_json())
    assert main(["fork", f"{older}@6", str(tmp_path / "new"), "optim.ema_decay=0.9"]) == 0
    told = capsys.readouterr().out
    assert "optim.ema_decay: None -> 0.9" in told
    assert "model." not in told


def test_a_checkpoint_that_is_trusted_no_more_is_not_forked_under_its_own_name_either(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(root / "a", run)
    write_distrusted(run, [Distrusted(beyond=80, attempt=9, saves=9, reason="a bit", time=1.0)])
    assert main(["fork", str(run / STEP_6), str(tmp_path / "new")]) == 4
    assert "is of a course that the run has given up" in capsys.readouterr().err
    assert main(["fork", str(run / "checkpoints/step-00000003"), str(tmp_path / "new")]) == 0


def test_forking_imports_no_torch(root: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pretrain.cli import main; code = main(sys.argv[1:])\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    arguments = ["fork", f"{root}/a@6", str(tmp_path / "new"), "train.steps=9"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
