"""A preflight asks a real S3 server: how fast it is read and written, and what is wrong with it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from services.radosgw import Radosgw

from pretrain.cli import main
from pretrain.storage import S3Settings, open_storage
from pretrain.storage.s3_clock import offset, store_offset

WRONG = "wr0ng-and-never-to-be-shown"


@pytest.fixture
def recipe(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run from shards in the bucket, which is validated and probed on others there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = str(tmp_path / "images")
    assert main(["data", "synth", images, "--samples", "60", "--image-size", "32", "--classes", "3"]) == 0
    assert main(["data", "pack", images, f"{s3_bucket}/shards", "--val-fraction", "0.3"]) == 0
    sections: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
        "data": {"train": f"{s3_bucket}/shards/train"},
        "train": {"global_batch_size": 16, "steps": 12, "precision": "float32"},
        "eval": {"probes": {"val": f"{s3_bucket}/shards/val"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def rows(said: str) -> dict[str, str]:
    """The table's lines by check."""
    return {line.split("  ")[0]: line for line in said.splitlines() if "  " in line}


def test_a_bucket_that_is_right_is_read_its_mirror_written_and_both_are_left_as_they_were(
    recipe: Path, s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(s3_bucket)
    before = [one.name for one in storage.list()]
    capsys.readouterr()
    assert main(["launch", "preflight", str(recipe), f"checkpoint.mirror={s3_bucket}/runs/a"]) == 0
    said = rows(capsys.readouterr().out)
    speed = r"[\d,]+ MB/s"
    assert re.search(
        rf"ok +{s3_bucket}/shards/train: {speed}; {s3_bucket}/shards/val: {speed}$", said["data"]
    )
    assert re.search(rf"ok +{s3_bucket}/runs/a: written at {speed}, read at {speed}", said["mirror"])
    assert f"agrees with {s3_bucket} within 5 s" in said["store's clock"]
    assert str(tmp_path / "cache") in said["cache"]
    assert [one.name for one in storage.list()] == before, "it leaves nothing behind"


def test_a_wrong_secret_is_the_data_s_and_the_mirror_s_finding_and_is_not_shown(
    recipe: Path,
    s3_bucket: str,
    s3_environment: Radosgw,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRONG)
    assert main(["launch", "preflight", str(recipe), f"checkpoint.mirror={s3_bucket}/runs/a"]) == 2
    out, err = capfd.readouterr()
    failed = {check: line for check, line in rows(out).items() if "FAILED" in line}
    assert failed.keys() == {"data", "mirror"}
    assert "the store refused access" in failed["data"]
    for secret in (WRONG, s3_environment.secret_key):
        assert secret not in out + err


def test_a_bucket_that_is_not_there_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.train=s3://no-such-bucket/shards", "checkpoint.mirror=s3://no-such-either/a"]
    assert main(["launch", "preflight", str(recipe), *overrides]) == 2
    failed = {check: line for check, line in rows(capsys.readouterr().out).items() if "FAILED" in line}
    assert failed.keys() == {"data", "mirror"}
    assert "s3://no-such-bucket/shards" in failed["data"]
    assert "the bucket does not exist" in failed["data"]
    assert "s3://no-such-either/a" in failed["mirror"]


def test_weights_to_begin_with_are_looked_for_in_the_bucket(
    recipe: Path, s3_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(s3_bucket)
    storage.put("exports/config.json", b"{}")
    assert main(["launch", "preflight", str(recipe), f"init_from={s3_bucket}/exports"]) == 0
    assert f"{s3_bucket}/exports/config.json can be read" in rows(capsys.readouterr().out)["init_from"]
    for wrong in ("nothing", "nothing/model.safetensors"):
        assert main(["launch", "preflight", str(recipe), f"init_from={s3_bucket}/{wrong}"]) == 2
        assert "FAILED" in rows(capsys.readouterr().out)["init_from"]


def test_a_store_tells_the_time_even_to_whom_it_refuses(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for secret in (None, WRONG):
        if secret:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        found = store_offset(f"{s3_bucket}/prefix", S3Settings())
        assert found is not None
        assert abs(found[0]) <= found[1] + 0.5
    late = time.time
    monkeypatch.setattr(time, "time", lambda: late() - 400)
    found = store_offset(s3_bucket, S3Settings())
    assert found is not None
    assert found[0] == pytest.approx(-400, abs=2)


def test_a_date_that_is_none_tells_nothing() -> None:
    assert offset(None, 0.0, 1.0) is None
    assert offset("yesterday", 0.0, 1.0) is None
    assert offset("Thu, 01 Jan 1970 00:16:40 GMT", 990.0, 2.0) == (-9.5, 1.5)
