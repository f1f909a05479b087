"""Datasets copied between folders and buckets (Ceph's radosgw), stopped, damaged and gone on with."""

from __future__ import annotations

import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from dataset_bytes import contents, start, wait_until
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.data.index import open_index
from pretrain.storage import open_storage


@pytest.fixture
def dataset(make_folder, tmp_path: Path, pretrain) -> Path:
    out = tmp_path / "set"
    words = ("data", "pack", make_folder(40), out, "--shard-bytes", 20_000, "--chunk-samples", 5)
    assert pretrain(*words) == 0
    return out


def shards(url: Path | str) -> list[str]:
    return sorted(name for name in contents(url) if name.endswith(".tar"))


def test_a_dataset_goes_round_all_kinds_of_places_and_comes_back_as_it_was(
    dataset: Path, s3_bucket: str, tmp_path: Path, pretrain, capsys
) -> None:
    places = [dataset, f"{s3_bucket}/a", f"{s3_bucket}/b", tmp_path / "back", tmp_path / "again"]
    for source, target in pairwise(places):
        assert pretrain("data", "sync", source, target) == 0
        assert f"{len(shards(dataset))} shards copied, 0 were there" in capsys.readouterr().out
        assert contents(target) == contents(dataset)
    assert pretrain("data", "sync", places[0], places[1]) == 0
    assert f"0 shards copied, {len(shards(dataset))} were there" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_sync_that_is_stopped_goes_on_and_lists_nothing_before_it_is_whole(
    make_folder, s3_bucket: str, tmp_path: Path, pretrain, capsys, how: str
) -> None:
    assert pretrain("data", "pack", make_folder(100), tmp_path / "set", "--shard-bytes", 5000) == 0
    target = open_storage(f"{s3_bucket}/set")
    process = start("data", "sync", tmp_path / "set", target.url, "--threads", 2)
    wait_until(lambda: len(list(target.list("sync-parts/"))) >= 4, process)
    process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 130)
    assert b"Traceback" not in errors
    assert not target.exists("index.safetensors")
    assert pretrain("data", "index", target.url) == 2
    assert "sync` to here has not finished" in capsys.readouterr().err
    done = len(list(target.list("sync-parts/")))
    assert pretrain("data", "sync", tmp_path / "set", target.url) == 0
    copied = int(capsys.readouterr().out.partition("; ")[2].split()[0])
    assert copied <= len(shards(tmp_path / "set")) - done
    assert contents(target.url) == contents(tmp_path / "set")


def test_right_objects_that_another_tool_copied_are_kept_and_wrong_ones_refused(
    dataset: Path, tmp_path: Path, pretrain, capsys
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    names = shards(dataset)
    shutil.copy(dataset / names[0], target)
    time_ns = os.stat(target / names[0]).st_mtime_ns
    assert pretrain("data", "sync", dataset, target) == 0
    assert "1 were there" in capsys.readouterr().out
    assert os.stat(target / names[0]).st_mtime_ns == time_ns
    wrong = bytearray((dataset / names[1]).read_bytes())
    wrong[700] ^= 1
    for content in (bytes(wrong), b"thesis"):
        other = tmp_path / f"other{len(content)}"
        other.mkdir()
        (other / names[1]).write_bytes(content)
        assert pretrain("data", "sync", dataset, other) == 2
        assert f"other bytes under the same name (the first: {names[1]})" in capsys.readouterr().err
        assert (other / names[1]).read_bytes() == content
        assert not (other / "index.safetensors").exists()
        assert pretrain("data", "sync", dataset, other, "--overwrite") == 0
        assert contents(other) == contents(dataset)


def test_a_source_that_is_damaged_is_named_and_never_listed_at_its_target(
    dataset: Path, tmp_path: Path, pretrain, capsys
) -> None:
    name = shards(dataset)[2]
    data = bytearray((dataset / name).read_bytes())
    data[900] ^= 1
    (dataset / name).write_bytes(data)
    assert pretrain("data", "sync", dataset, tmp_path / "target") == 3
    message = capsys.readouterr().err
    assert f"{name}: sha256" in message
    assert "pretrain data verify" in message
    assert not (tmp_path / "target" / "index.safetensors").exists()
    assert not (tmp_path / "target" / name).exists()


def test_faults_of_the_store_do_not_change_what_arrives(
    dataset: Path, s3_environment: Radosgw, s3_bucket: str, tmp_path: Path, pretrain, monkeypatch
) -> None:
    assert pretrain("data", "sync", dataset, f"{s3_bucket}/set") == 0
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        for _ in range(3):
            proxy.faults += [Fault(kind="503"), Fault(kind="close", after_bytes=3000), Fault(kind="reset")]
        assert pretrain("data", "sync", f"{s3_bucket}/set", tmp_path / "back") == 0
        assert not proxy.faults
        proxy.faults += [Fault(kind="503", method="PUT"), Fault(kind="reset", method="PUT")]
        assert pretrain("data", "sync", tmp_path / "back", f"{s3_bucket}/again") == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_environment.endpoint)
    assert contents(tmp_path / "back") == contents(f"{s3_bucket}/again") == contents(dataset)


def test_only_what_changed_is_copied_to_an_older_version_and_delete_removes_the_rest(
    dataset: Path, tmp_path: Path, pretrain, capsys
) -> None:
    mirror = tmp_path / "mirror"
    assert pretrain("data", "sync", dataset, mirror) == 0
    (tmp_path / "keys.txt").write_text("bee/003\n")
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "keys.txt") == 0
    capsys.readouterr()
    assert pretrain("data", "sync", dataset, mirror) == 0
    assert "; 1 shard copied" in capsys.readouterr().out
    assert open_index(str(mirror)).identity == open_index(str(dataset)).identity
    assert len(shards(mirror)) == len(shards(dataset)) + 1  # the old one is still there
    assert pretrain("data", "sync", dataset, mirror, "--delete") == 0
    assert contents(mirror) == contents(dataset)


def test_places_that_make_no_sense_are_refused(dataset: Path, tmp_path: Path, pretrain, capsys) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(dataset / shards(dataset)[0], tmp_path / "bare")
    for words, says in (
        ((tmp_path / "bare", tmp_path / "x"), "pretrain data index"),
        ((tmp_path / "nothing", tmp_path / "x"), "nothing there"),
        ((dataset, dataset), "one place"),
        ((dataset, tmp_path / "x", "--threads", 0), "--threads 0"),
        ((dataset, dataset / "000000.tar"), "that is a file"),
    ):
        assert pretrain("data", "sync", *words) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
