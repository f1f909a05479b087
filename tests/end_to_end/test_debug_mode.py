"""Looking for a fault as a user would: --debug, --profile, --overfit-one-batch, alone and under a launcher."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment
from small_run import pretrain

from pretrain.checkpoint.attempts import read_attempts
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.metrics.journal import read_journal

POISONED = ROOT / "tests" / "end_to_end" / "poisoned_forward.py"


def is_traced(run_dir: Path) -> bool:
    """A trace that can be read, and a table of operators that has the products of matrices."""
    trace = json.loads(gzip.decompress((run_dir / "profile" / "trace.json.gz").read_bytes()))
    return bool(trace["traceEvents"]) and "aten::addmm" in (run_dir / "profile/operators.txt").read_text()


def test_the_debug_recipe_shows_its_first_batches_and_leaves_a_profile(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"data.train={shards}", f"run_dir={run_dir}", "train.steps=6"]
    done = pretrain("train", "configs/debug.yaml", *overrides, "--debug", "--profile", "3")
    assert done.returncode == 0, done.stderr
    assert "third batch: images (normalised)" in done.stderr
    assert (run_dir / "debug" / "first_batch.png").stat().st_size > 1000
    assert "--profile: 3 steps traced" in done.stderr
    assert is_traced(run_dir)
    assert "images a step" not in done.stderr, "the recipe's steps are small enough"


@pytest.mark.slow
def test_steps_of_a_large_recipe_are_small_on_one_device_and_stay_as_the_run_has_them(
    recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    sections = yaml.safe_load(recipe.read_text())
    sections["train"]["global_batch_size"] = 64
    sections["checkpoint"] = {"every_steps": 2}
    recipe.write_text(yaml.safe_dump(sections))

    def positions(*words: str) -> int:
        """That the run has consumed after it was trained so."""
        done = pretrain("train", str(recipe), *words)
        assert done.returncode == 0, done.stderr
        said = "--debug: 32 images a step; train.global_batch_size=64 keeps the recipe's" in done.stderr
        assert said == (run_dir.name == "run" and "--debug" in words)
        return read_manifest(committed(run_dir)[-1]).samples

    assert positions("train.steps=2", "--debug") == 2 * 32
    assert positions("train.steps=4", "--debug") == 4 * 32, "it goes on with what it began with"

    # One that began with large steps is looked at as it is.
    run_dir = tmp_path / "large"
    assert positions(f"run_dir={run_dir}", "train.steps=2") == 2 * 64
    assert positions(f"run_dir={run_dir}", "train.steps=4", "--debug") == 4 * 64


def test_one_batch_is_learned_by_heart_and_nothing_is_saved(recipe: Path, tmp_path: Path) -> None:
    done = pretrain("train", str(recipe), "--overfit-one-batch", "train.steps=30", "optim.lr=3e-3")
    assert done.returncode == 0, done.stderr
    assert "one batch, 30 times: its loss went from" in done.stderr
    assert not committed(tmp_path / "run")
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.slow
def test_the_launcher_passes_on_what_looks_for_faults_and_starts_one_batch_once(
    recipe: Path, tmp_path: Path
) -> None:
    local = ["launch", "local", str(recipe), "--processes", "2", "--overfit-one-batch"]
    done = pretrain(*local, "--profile", "3", "train.steps=30", "optim.lr=3e-3")
    assert done.returncode == 0, done.stderr
    assert "one batch, 30 times: its loss went from" in done.stderr
    run_dir = tmp_path / "run"
    assert is_traced(run_dir)
    assert not committed(run_dir)
    assert [line["exit_code"] for line in read_attempts(run_dir)] == [0]

    # A loss that does not fall is no crash that another start may mend.
    run_dir = tmp_path / "unlearned"
    done = pretrain(*local, f"run_dir={run_dir}", "train.steps=8", "optim.lr=1e-30")
    assert done.returncode == 1
    assert "it did not fall" in done.stderr
    assert len(read_attempts(run_dir)) == 1
    assert [r["world_size"] for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "start"] == [2]


def test_the_line_of_the_forward_whose_gradient_is_not_finite_is_named(recipe: Path) -> None:
    def trained(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(POISONED), "train", str(recipe), "train.steps=2", *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=clean_environment(), cwd=ROOT
        )

    done = trained("--debug")
    assert done.returncode == 1
    lines = POISONED.read_text().splitlines()
    number = next(n for n, line in enumerate(lines, start=1) if "THE LINE" in line)
    assert f'poisoned_forward.py", line {number}, in forward' in done.stderr
    assert "returned nan values" in done.stderr
    assert "poisoned_forward.py" not in trained().stderr, "only --debug looks for it"
