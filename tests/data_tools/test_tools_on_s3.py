"""The data tools against Ceph's radosgw."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from pretrain.data.index import open_index
from pretrain.storage import open_storage


def test_packing_into_a_bucket_gives_the_bytes_that_packing_to_disk_gives(
    make_folder, s3_bucket: str, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    source, options = make_folder(10), ("--shard-bytes", 30_000, "--val-fraction", 0.2)
    assert pretrain("data", "pack", source, f"{s3_bucket}/set", *options) == 0
    assert pretrain("data", "pack", source, tmp_path / "out", *options) == 0
    bucket = open_storage(f"{s3_bucket}/set")
    stored = {info.name: bucket.read(info.name) for info in bucket.list()}
    local = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert stored == local
    url = f"{s3_bucket}/set/train"
    assert pretrain("data", "verify", url, "--decode") == 0
    capsys.readouterr()
    assert pretrain("data", "stats", url, "--json", "--sheet", tmp_path / "sheet.png") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == open_index(url).num_samples
    assert (tmp_path / "sheet.png").exists()
    assert pretrain("data", "index", url) == 0
    assert "up to date" in capsys.readouterr().out


def test_folders_tars_and_manifests_in_a_bucket_are_packed_like_local_ones(
    make_folder, s3_bucket: str, tmp_path: Path, pretrain
) -> None:
    source, bucket = make_folder(4), open_storage(s3_bucket)
    rows = ["path,label"]
    for path in sorted(source.rglob("*.png")):
        bucket.put(f"in/{path.relative_to(source)}", path)
        rows.append(f"in/{path.relative_to(source)},{path.parent.name}")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        tar.add(source, arcname="")
    bucket.put("in.tar", tmp_path / "in.tar")
    bucket.put("in.csv", "\n".join(rows).encode())
    assert pretrain("data", "pack", source, tmp_path / "reference") == 0
    shard = (tmp_path / "reference" / "000000.tar").read_bytes()
    for kind in ("in", "in.tar"):
        out = tmp_path / f"from-{kind}"
        assert pretrain("data", "pack", f"{s3_bucket}/{kind}", out) == 0
        assert (out / "000000.tar").read_bytes() == shard
    assert pretrain("data", "pack", f"{s3_bucket}/in.csv", tmp_path / "csv") == 0
    assert open_index(str(tmp_path / "csv")).num_samples == 12
    assert open_index(str(tmp_path / "csv")).class_names == ("ant", "bee", "cat")


def test_a_missing_bucket_and_a_wrong_secret_are_wrong_usage(
    make_folder, s3_bucket: str, tmp_path: Path, pretrain, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    source = make_folder(2)
    for words in (
        ("pack", source, "s3://no-such-bucket-here/x"),
        ("pack", "s3://no-such-bucket-here/x", tmp_path / "out"),
        ("index", "s3://no-such-bucket-here/x"),
        ("verify", "s3://no-such-bucket-here/x"),
        ("stats", "s3://no-such-bucket-here/x"),
    ):
        assert pretrain("data", *words) == 2, words
        assert "no-such-bucket-here" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for words in (("pack", source, s3_bucket), ("index", s3_bucket), ("stats", s3_bucket)):
        assert pretrain("data", *words) == 2, words
        assert "wrong" not in capsys.readouterr().err.replace("wrong credentials", "")
