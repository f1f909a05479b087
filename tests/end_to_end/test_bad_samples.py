"""Images that do not decode, through the real commands: replaced, written down, counted, and too many of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from data.tiny_shards import jpeg, write_dataset
from launching import ROOT, clean_environment, run_ranks, wait_for
from small_run import RECIPE, pretrain

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.data.ledger import read_ledger
from pretrain.data.order import Order, lanes_for
from pretrain.metrics.journal import read_journal, steps_of

TRAIN = ["-m", "pretrain.train"]
BAD = (13, 77, 140)
BATCH, STEPS = 64, 18  # budgets count from 1000 samples on: from step 16


def image(i: int) -> bytes:
    return b"not an image" if i in BAD else jpeg(i, (40, 32))


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "shards"
    write_dataset(folder, count=150, per_shard=50, chunk_samples=16, image=image)
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, bad_shards: Path) -> Callable[..., Path]:
    def write(name: str, **data: object) -> Path:
        sections = {
            **RECIPE,
            "run_dir": str(tmp_path / name),
            "data": {**RECIPE["data"], "train": str(bad_shards), **data},
            "train": {"global_batch_size": BATCH, "steps": STEPS, "precision": "float32"},
            "checkpoint": {"every_steps": 3, "keep_last": 2},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


def wanted(bad_shards: Path) -> dict[int, tuple[str, int]]:
    """Position -> (bad key, step), by the order alone."""
    from pretrain.data.index import open_index, open_samples

    index = open_index(str(bad_shards))
    order = Order(chunk_samples=index.chunk_samples, seed=RECIPE["seed"], lanes=lanes_for(BATCH))  # type: ignore[arg-type]
    keys, ends = open_samples(index), index.chunk_samples.cumsum()
    found = {}
    for g in range(STEPS * BATCH):
        chunk, row = (int(value[0]) for value in order.locate([g]))
        number = int(ends[chunk] - index.chunk_samples[chunk]) + row
        if number in BAD:
            found[g] = keys.key(number), g // BATCH + 1
    return found


def ledger_of(run: Path) -> dict[int, tuple[str, int]]:
    return {line["g"]: (line["key"], line["step"]) for line in read_ledger(run)}


def test_killed_resumed_ended_by_its_budget_and_allowed_more_a_run_replaces_the_same_samples(
    write_recipe: Callable[..., Path], tmp_path: Path, bad_shards: Path
) -> None:
    recipe, run = write_recipe("run"), tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        train = subprocess.Popen(
            [sys.executable, *TRAIN, str(recipe)],
            stdout=log,
            stderr=log,
            env=clean_environment(),
            cwd=ROOT,
        )
    try:
        wait_for(lambda: bool(committed(run)) and len(read_ledger(run)) > 2, [train], timeout_seconds=120)
    finally:
        train.send_signal(signal.SIGKILL)
        train.wait()
    before = ledger_of(run)
    assert len(before) < len(wanted(bad_shards)), "it was killed too late"

    # On two ranks it meets the bound on what may be replaced: all of them end with 3.
    run_ranks(2, [*TRAIN, str(recipe)], timeout_seconds=200, expect=3, folder=tmp_path)
    for rank in range(2):
        said = (tmp_path / f"rank-{rank}.log").read_text()
        assert "data.max_replaced_fraction=0.001" in said, said
        assert str(run / "ledger") in said
        assert "Traceback" not in said
        record = json.loads((run / "attempts" / "2" / f"exit-{rank}.json").read_text())
        assert record["code"] == 3
    assert max(steps_of(read_journal(run / "journal.jsonl"))) == 16  # the first with 1000 samples

    # Allowing more lets the same run go on, from what it had saved.
    done = pretrain("train", str(recipe), "data.max_replaced_fraction=0.05")
    assert done.returncode == 0, done.stderr
    after = ledger_of(run)
    assert after == wanted(bad_shards)
    assert before.items() <= after.items()
    files = {path.name for path in (run / "ledger").iterdir()}
    ranks_of = {1: (0,), 2: (0, 1), 3: (0,)}  # of the three attempts
    assert files == {f"attempt-{a}-rank-{r}.jsonl" for a, ranks in ranks_of.items() for r in ranks}

    assert read_manifest(find_newest(run)).replaced == len(after)
    lines = steps_of(read_journal(run / "journal.jsonl"))
    for step, line in lines.items():
        assert line["replaced"] == sum(at <= step for _, at in after.values())
    shown = pretrain("report", str(run))
    assert f"samples replaced       {len(after)} (" in shown.stdout


def test_validation_and_a_probe_leave_out_what_does_not_decode_and_say_so(
    write_recipe: Callable[..., Path], tmp_path: Path, bad_shards: Path, shards: Path
) -> None:
    recipe = write_recipe("val", val=str(bad_shards), max_replaced_fraction=1.0)
    done = pretrain("train", str(recipe), "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert "3 images do not decode and were left out" in done.stderr + done.stdout
    records = read_journal(tmp_path / "val" / "journal.jsonl")
    assert [line["unreadable"] for line in records if line["event"] == "validation"] == [3]

    probe = ["--probe", "knn", "--train", str(bad_shards), "--val", str(shards)]
    done = pretrain("evaluate", str(tmp_path / "val"), *probe)
    assert done.returncode == 0, done.stderr
    assert "3 images are left out, the first: " in done.stderr
