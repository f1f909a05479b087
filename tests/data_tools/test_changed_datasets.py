"""Datasets of a run that moved, were rewritten where they lie, or are gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.tiny_shards import write_dataset
from run_folders import ALL_KEYS, STEP, B, Run, audit, keys_file, open_to_train

from pretrain.checkpoint.compatibility import check_resumable
from pretrain.cli import main
from pretrain.datasets import newest_manifest
from pretrain.errors import CheckpointMismatchError, DataError


def test_a_dataset_that_moved_is_found_and_one_that_is_another_is_refused_with_3(
    start_run: Callable[[], Run], tmp_path: Path
) -> None:
    run = start_run()
    write_dataset(tmp_path / "more", count=30)
    assert main(["data-change", str(run.folder), "--add", str(tmp_path / "more")]) == 0
    (tmp_path / "more").rename(tmp_path / "moved")
    write_dataset(tmp_path / "more", count=31)
    with pytest.raises(
        DataError, match=r"bring those shards back; where they have moved, say so in .*segments\.json"
    ):
        open_to_train(run)
    segments = run.folder / "segments.json"
    segments.write_text(segments.read_text().replace(str(tmp_path / "more"), str(tmp_path / "moved")))
    assert len(open_to_train(run).indexes) == 2


def test_a_dataset_that_was_rewritten_in_place_is_gone_on_from_where_it_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a redaction: the images that are left are other chunks under another index."""
    write_dataset(tmp_path / "a", count=75)
    run = Run(tmp_path / "run", str(tmp_path / "a"))
    run.train(0, STEP, saved=STEP)
    before = open_to_train(run)
    shutil.rmtree(tmp_path / "a")
    write_dataset(tmp_path / "a", count=70)

    now = open_to_train(run).segments
    manifest = newest_manifest(run.folder)
    assert now != manifest.segments, "training on as if nothing had happened is refused"
    with pytest.raises(CheckpointMismatchError, match="--renew URL"):
        check_resumable(
            manifest,
            config=manifest.config,
            dataset={},
            order=before.stream.fingerprint(),
            segments=now,
            skipped=[],
            parameters={},
            where="here",
        )
    folder = str(run.folder)
    assert main(["data-change", folder, "--exclude", keys_file(tmp_path / "k", ["s00003"])]) == 2
    assert "give --renew" in capsys.readouterr().err
    assert main(["data-change", folder, "--renew", str(tmp_path / "a")]) == 0
    assert main(["data-change", folder, "--renew", str(tmp_path / "a")]) == 2
    assert "its index is the one that the run is trained on" in capsys.readouterr().err

    data = open_to_train(run)
    data.require_from(STEP * B)
    with pytest.raises(DataError, match="before its data was changed"):
        data.require_from(STEP * B - B)
    assert [index.num_samples for index in data.indexes] == [70]
    assert data.stream.samples_by_dataset == (70,)
    assert data.segments[:1] == manifest.segments
    positions = np.arange(STEP * B)
    for got, wanted in zip(
        data.stream.locate(positions)[1:], before.stream.locate(positions)[1:], strict=True
    ):
        assert np.array_equal(got, wanted), "the order of what was consumed is still known"
    assert set(data.stream.locate(np.arange(STEP * B, 20 * B)).datasets) == {0}

    run.train(STEP, STEP + 30, saved=STEP + 30)
    lines = audit(run, [*ALL_KEYS], capsys, tmp_path)
    assert [line for line in lines if line["event"] == "gone"] == [
        {"event": "gone", "dataset": str(tmp_path / "a"), "samples": 75}
    ]
    assert {line["segment"] for line in lines if "g" in line} == {1}
    assert {line["key"] for line in lines if line["event"] == "unknown"} == {
        f"s{i:05d}" for i in range(70, 75)
    }
    assert main(["order", folder, "--count", "48"]) == 0
    keys = [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()]
    assert keys[: STEP * B] == [None] * STEP * B
    assert None not in keys[STEP * B :]


def test_a_rewritten_dataset_of_other_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "a", count=75)
    run = Run(tmp_path / "run", str(tmp_path / "a"))
    run.train(0, STEP, saved=STEP)
    shutil.rmtree(tmp_path / "a")
    write_dataset(tmp_path / "a", count=7)
    assert main(["data-change", str(run.folder), "--renew", str(tmp_path / "a")]) == 2
    assert "has 7 classes" in (said := capsys.readouterr().err)
    assert "the run has learned 10" in said
    assert not (run.folder / "segments.json").exists()


def test_a_dataset_may_be_deleted_once_the_run_is_past_it(
    datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "a", count=75)
    run = Run(tmp_path / "run", [str(tmp_path / "a"), datasets["b"]])
    run.train(0, STEP, saved=STEP)
    assert main(["data-change", str(run.folder), "--remove", str(tmp_path / "a")]) == 0
    shutil.rmtree(tmp_path / "a")
    data = open_to_train(run)
    assert [index.url for index in data.indexes] == [datasets["b"]]
    assert [dataset.url for dataset in data.gone] == [str(tmp_path / "a")]
    for path in (run.folder / "segments").glob("chunks-*.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert main(["order", str(run.folder)]) == 4
    assert "is damaged" in capsys.readouterr().err
