"""`pretrain benchmark data` from its command line, on tiny shards on disk and in a bucket."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pretrain.benchmarks import contestants
from pretrain.cli import main
from pretrain.data.index import open_index
from pretrain.storage import open_storage

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from tiny_shards import jpeg, write_dataset

QUICK = ["--seconds", "0.2", "--repeats", "2", "--processes", "1", "--size", "16"]


def check(printed: str, *, loaders: list[str]) -> None:
    told = json.loads(printed)
    assert told["samples"] == 200
    assert set(told["stages_ms_an_image"]) == {"fetch", "frame", "decode", "augment"}
    assert all(spent > 0 for spent in told["stages_ms_an_image"].values())
    assert [row["loader"] for row in told["loaders"]] == loaders
    for row in told["loaders"]:
        assert 0 < row["lowest"] <= row["images_per_second"] <= row["highest"]
    by_name = {row["loader"]: row for row in told["loaders"]}
    assert by_name["webdataset"]["ratio_to_webdataset"] == 1
    ratio = by_name["pretrain"]["images_per_second"] / by_name["webdataset"]["images_per_second"]
    assert by_name["pretrain"]["ratio_to_webdataset"] == pytest.approx(ratio)


def test_loaders_are_timed_on_the_same_shards_from_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "d", count=200)
    loaders = ["pretrain", "webdataset", "webdataset pipe"]
    assert main(["benchmark", "data", str(tmp_path / "d"), "--json", "--only", *loaders, *QUICK]) == 0
    check(capsys.readouterr().out, loaders=loaders)


def test_with_fewer_shards_than_processes_webdataset_is_left_out_there_and_refused_where_it_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "d", count=200, per_shard=100)
    shards = len(open_index(str(tmp_path / "d")).shard_names)
    many = str(shards + 1)
    command = ["benchmark", "data", str(tmp_path / "d"), "--json", *QUICK]
    assert main([*command, "--repeats", "1", "--processes", "1", many, "--peer-python", sys.executable]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    rows = [(row["loader"], row["processes"]) for row in told["loaders"]]
    assert ("webdataset", 1) in rows
    assert ("pretrain", shards + 1) in rows
    left_out = {"webdataset", "webdataset pipe"}
    assert {out["loader"] for out in told["left_out"]} == left_out
    assert not [row for row in rows if row[0] in left_out and row[1] == shards + 1]
    by_row = dict(zip(rows, told["loaders"], strict=True))
    assert by_row["pretrain", 1]["ratio_to_webdataset"] is not None
    assert by_row["pretrain", shards + 1]["ratio_to_webdataset"] is None
    assert f"webdataset with {many} processes: needs {many} shards" in printed.err

    assert main([*command, "--only", "pretrain", "webdataset", "--processes", "1", many]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert f"webdataset needs {many} shards" in said.err
    assert f"has {shards} shards" in said.err
    assert f"--processes {shards} at most" in said.err
    assert main([*command, "--only", "pretrain", "--processes", many]) == 0


@pytest.mark.slow
def test_loaders_are_timed_on_the_same_shards_from_a_bucket(
    tmp_path: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "d", count=200)
    store = open_storage(f"{s3_bucket}/some/where")
    for path in (tmp_path / "d").iterdir():
        store.put(path.name, path)
    loaders = ["pretrain", "webdataset", "webdataset pipe"]
    assert main(["benchmark", "data", store.url, "--json", "--only", *loaders, *QUICK]) == 0
    check(capsys.readouterr().out, loaders=loaders)


def test_formats_of_the_peers_own_need_a_place_in_the_bucket(
    tmp_path: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "d", count=20)
    store = open_storage(f"{s3_bucket}/no/place")
    for path in (tmp_path / "d").iterdir():
        store.put(path.name, path)
    assert main(["benchmark", "data", store.url, "--only", "pretrain", "litdata", *QUICK]) == 2
    assert "--scratch" in capsys.readouterr().err
    assert main(["benchmark", "data", store.url, "--scratch", str(tmp_path / "x"), *QUICK]) == 2
    assert "no bucket" in capsys.readouterr().err


def test_a_loader_that_fails_is_named_with_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "d", count=40)
    (tmp_path / "d" / "shard-0000.tar").write_bytes(b"no tar " * 200)
    arguments = ["benchmark", "data", str(tmp_path / "d"), "--only", "webdataset", *QUICK]
    assert main(arguments) != 0
    told = capsys.readouterr().err
    assert "shard-0000.tar" in told


def test_a_dataset_without_an_index_is_wrong_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    assert main(["benchmark", "data", str(tmp_path), *QUICK]) == 2
    assert "pretrain data index" in capsys.readouterr().err


def test_the_peers_crop_is_of_the_size_asked_for_and_their_samples_are_the_shards(tmp_path: Path) -> None:
    for size in [(1, 1), (40, 3), (300, 200)]:
        image = contestants.random_resized_crop(jpeg(0, size=size), 24)
        assert image.shape == (3, 24, 24)
    index = write_dataset(tmp_path / "d", count=45)
    tars = [str(tmp_path / "d" / shard) for shard in open_index(index.url).shard_names]
    samples = contestants.members_of(tars)
    assert [label for _, label in samples] == [i % 10 for i in range(45)]
    assert samples[7][0] == jpeg(7)
