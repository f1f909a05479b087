"""Buckets that are not there, or may not be read: words, exit code 2, and no secret shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_rows import Result, Row, check, run_rows
from services.radosgw import Radosgw
from small_run import pretrain

TRAIN = "train {recipe} run_dir={new} data.workers=0"

S3_ROWS = {
    "a bucket that is not there": Row(
        command=f"{TRAIN} data.train=s3://no-such-bucket/shards",
        code=2,
        says=(
            "s3://no-such-bucket/shards",
            "the bucket does not exist",
            "check the URL and AWS_ENDPOINT_URL",
        ),
    ),
    "nothing below the prefix": Row(
        command=f"{TRAIN} data.train={{bucket}}/nothing", code=2, says=("/nothing: there is nothing there",)
    ),
    "a URL without a bucket": Row(
        command=f"{TRAIN} data.train=s3://", code=2, says=("no bucket in this URL",)
    ),
    "a wrong secret": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards",
        code=2,
        says=("the store refused access", "SignatureDoesNotMatch", "check AWS_ACCESS_KEY_ID"),
        environment={"AWS_SECRET_ACCESS_KEY": "wr0ng-and-never-to-be-shown"},
    ),
    "an unknown key": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards",
        code=2,
        says=("the store refused access", "InvalidAccessKeyId"),
        environment={"AWS_ACCESS_KEY_ID": "nobody"},
    ),
    "an endpoint where nothing listens": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards storage.start_seconds=2",
        code=2,
        says=("/shards", "nothing answers there", "check AWS_ENDPOINT_URL"),
        environment={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},  # the discard port: closed
    ),
    "a cache where no cache can be": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards data.cache_dir=/proc",
        code=2,
        says=("cache /proc/", "choose a data.cache_dir"),
    ),
    "no credentials": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards",
        code=2,
        says=("no usable credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
        environment={"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ),
    "a wrong secret to pack with": Row(
        command="data pack {images} {bucket}/new",
        code=2,
        says=("the store refused access (HTTP 403 Forbidden)",),
        environment={"AWS_SECRET_ACCESS_KEY": "wr0ng-and-never-to-be-shown"},
    ),
    "the right secret": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards train.steps=1", code=0, says=("finished at step 1",)
    ),
}


@pytest.fixture
def s3_results(
    s3_bucket: str,
    s3_environment: Radosgw,
    recipe: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Result]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = shards.parent / "images"
    packed = pretrain("data", "pack", str(images), f"{s3_bucket}/shards")
    assert packed.returncode == 0, packed.stderr
    return run_rows(S3_ROWS, {"recipe": recipe, "images": images, "bucket": s3_bucket}, tmp_path)


def test_a_bucket_that_cannot_be_read_ends_with_2_and_no_secret_is_shown(
    s3_results: dict[str, Result], s3_environment: Radosgw
) -> None:
    for wrong, row in S3_ROWS.items():
        check(row, s3_results[wrong])
        assert s3_environment.secret_key not in s3_results[wrong].said, wrong
        assert "never-to-be-shown" not in s3_results[wrong].said, wrong
