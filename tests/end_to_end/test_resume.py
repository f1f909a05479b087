"""Real ranks, killed and resumed, against a run that nothing happened to."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from launching import ROOT, clean_environment, free_port, run_ranks, start_ranks, wait_for, wait_for_ranks
from small_run import RECIPE, losses, pretrain
from wrong_things import flip_a_byte

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.load import CheckpointReader
from pretrain.checkpoint.manifest import KINDS, MANIFEST_NAME, committed, read_manifest
from pretrain.metrics.journal import read_journal

TRAIN = ["-m", "pretrain.train"]


def last_step(run_dir: Path) -> int:
    journal = run_dir / "journal.jsonl"
    return max(losses(run_dir), default=0) if journal.exists() else 0


def state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every weight and moment of a checkpoint, whole."""
    reader = CheckpointReader(folder)
    whole = {}
    for name, shape in reader.manifest.parameters.items():
        for kind in KINDS:
            size = torch.Size(shape).numel()
            parts = sorted(reader.pieces(name, kind, 0, size), key=lambda part: part[0])
            whole[name, kind] = torch.cat([values for _, values in parts])
    return whole


def write_recipe(path: Path, run_dir: Path, shards: Path, **sections: dict) -> Path:
    merged = {**RECIPE, "run_dir": str(run_dir), "data": {**RECIPE["data"], "train": str(shards)}}
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section}
    path.write_text(yaml.safe_dump(merged))
    return path


def stage(number: int) -> dict:
    return {"zero_optimization": {"stage": number}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Twelve float32 steps on two ranks, ZeRO 1, started by DeepSpeed's own launcher."""
    root = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(root / "recipe.yaml", root / "run", shards, deepspeed=stage(1))
    deepspeed = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*deepspeed, "--module", "pretrain.train", str(recipe)],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "run"


def test_a_run_killed_and_resumed_on_as_many_ranks_is_bitwise_the_run_that_was_not(
    tmp_path: Path, uninterrupted: Path, shards: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "run", shards, deepspeed=stage(1))
    ranks = start_ranks(2, [*TRAIN, str(recipe)], folder=tmp_path)
    run_dir = tmp_path / "run"
    wait_for(lambda: last_step(run_dir) >= 5 and bool(committed(run_dir)), ranks, timeout_seconds=150)
    for rank in ranks:
        rank.kill()
    assert set(wait_for_ranks(ranks, timeout_seconds=20)) == {-signal.SIGKILL}
    assert not (tmp_path / "run" / "finished.json").exists()

    done = pretrain("launch", "local", str(recipe), "--processes", "2", timeout=250)
    assert done.returncode == 0, done.stderr

    resumed = [r for r in read_journal(tmp_path / "run" / "journal.jsonl") if r["event"] == "start"][-1]
    assert resumed["resumed"]
    assert 0 < resumed["step"] < 12
    assert losses(tmp_path / "run") == losses(uninterrupted)
    expected, got = state(find_newest(uninterrupted)), state(find_newest(tmp_path / "run"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("world_size", "zero_stage"), [(3, 3), (1, None)], ids=["three ranks, ZeRO 3", "one process, accelerate"]
)
def test_ten_losses_after_a_resume_elsewhere_are_those_of_the_uninterrupted_run(
    tmp_path: Path, uninterrupted: Path, shards: Path, world_size: int, zero_stage: int | None
) -> None:
    """From step 2 on: at 3 ranks the 8 pairs of a batch are cut into 3, 3 and 2, the last padded."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    first = committed(uninterrupted)[0]
    shutil.copytree(first, run_dir / "checkpoints" / first.name)
    recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, shards, deepspeed=stage(zero_stage or 1))
    if zero_stage is None:
        done = pretrain("train", str(recipe))
        assert done.returncode == 0, done.stderr
    else:
        run_ranks(world_size, [*TRAIN, str(recipe)], timeout_seconds=200, folder=tmp_path)
    expected = {step: loss for step, loss in losses(uninterrupted).items() if step > 3}
    assert losses(run_dir) == pytest.approx(expected, rel=1e-5)
    assert find_newest(run_dir).name == "step-00000012"


def test_what_one_rank_cannot_verify_all_pass_over_and_count_and_told_to_stop_all_save_one_step_and_leave_with_75(
    tmp_path: Path, uninterrupted: Path, shards: Path
) -> None:
    port, run_dir = free_port(), tmp_path / "run"
    sound, damaged = (run_dir / "checkpoints" / path.name for path in committed(uninterrupted)[:2])
    shutil.copytree(uninterrupted / "checkpoints" / sound.name, sound)
    shutil.copytree(uninterrupted / "checkpoints" / damaged.name, damaged)
    flip_a_byte(damaged / "rank-00001.safetensors")  # which rank 0 has no need to read
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        run_dir,
        shards,
        deepspeed=stage(2),
        train={"steps": 2000, "precision": "bf16"},
        checkpoint={"every_steps": 1000},
        metrics={"port": port},
    )
    ranks = start_ranks(2, [*TRAIN, str(recipe)], folder=tmp_path)
    wait_for(lambda: last_step(run_dir) >= 5, ranks, timeout_seconds=150)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        served = answer.read().decode()
    assert float(re.search(r"^pretrain_steps_total (\S+)$", served, re.MULTILINE)[1]) >= 2
    assert re.search(r"^pretrain_loss [0-9.]+$", served, re.MULTILINE)
    assert re.search(r"^pretrain_checkpoints_rejected_total 1\.0$", served, re.MULTILINE)
    journal = {record["event"]: record for record in read_journal(run_dir / "journal.jsonl")}
    assert Path(journal["checkpoint_rejected"]["path"]) == damaged
    assert "rank-00001.safetensors: " in journal["checkpoint_rejected"]["reason"]
    start = {key: value for key, value in journal["start"].items() if key.startswith("previous_")}
    assert start == {"previous_attempt": 1, "previous_world_size": 2, "previous_zero_stage": 1}
    assert (journal["start"]["step"], journal["start"]["zero_stage"]) == (3, 2)
    changed = journal["config_changed"]["changed"]
    assert changed["deepspeed.zero_optimization.stage"] == {"before": 1, "now": 2}
    assert changed["train.precision"] == {"before": "float32", "now": "bf16"}
    assert "run_dir" not in changed
    assert [path.name for path in (run_dir / "checkpoints").glob("*.rejected")] == [
        f"{damaged.name}.rejected"
    ]

    ranks[1].send_signal(signal.SIGTERM)  # one of them is enough: they agree
    assert wait_for_ranks(ranks, timeout_seconds=60) == [75, 75]
    saved = find_newest(run_dir)
    assert int(saved.name.removeprefix("step-")) == last_step(run_dir)
    assert not (run_dir / "finished.json").exists()


def test_a_finished_run_started_again_says_so_and_changes_nothing(
    uninterrupted: Path, tmp_path: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}
    done = pretrain("train", str(uninterrupted.parent / "recipe.yaml"))
    assert (done.returncode, "finished at step 12" in done.stdout) == (0, True)
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}


def test_a_checkpoint_older_than_some_keys_goes_on_as_their_defaults_say_and_not_otherwise(
    tmp_path: Path, uninterrupted: Path, shards: Path
) -> None:
    newer = ("rand_augment", "three_augment", "erasing", "mixup", "cutmix")
    run_dir = tmp_path / "run"
    first = committed(uninterrupted)[0]
    folder = run_dir / "checkpoints" / first.name
    shutil.copytree(first, folder)
    manifest = read_manifest(folder)
    known = {name: value for name, value in manifest.config["data"].items() if name not in newer}
    assert len(known) == len(manifest.config["data"]) - len(newer)
    older = replace(manifest, config={**manifest.config, "data": known})
    (folder / MANIFEST_NAME).write_text(older.to_json())
    recipe = write_recipe(tmp_path / "recipe.yaml", run_dir, shards, train={"steps": 12})

    done = pretrain("train", str(recipe), "data.mixup=0.8", "data.rand_augment={ops: 2}")
    assert done.returncode == 4
    assert "data.mixup: 0.0 in the checkpoint, 0.8 now" in done.stderr
    assert "data.rand_augment.ops: None in the checkpoint, 2 now" in done.stderr
    assert "data.cutmix" not in done.stderr

    done = pretrain("train", str(recipe))
    assert done.returncode == 0, done.stderr
    expected = {step: loss for step, loss in losses(uninterrupted).items() if step > 3}
    assert losses(run_dir) == pytest.approx(expected, rel=1e-5)
    assert find_newest(run_dir).name == "step-00000012"
