"""Fixtures that several packages share: a real S3 server, fresh buckets on it, real data."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.aws_variables import AWS_VARIABLES
from services.fault_proxy import FaultProxy
from services.radosgw import Radosgw, missing_binaries
from services.required import skip_or_fail


def pytest_configure() -> None:
    # Under nohup, or behind an `&`, these are ignored, and all that tests start would ignore them too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Radosgw]:
    """Ceph's radosgw, started for the first test that asks and stopped with the session."""
    missing = missing_binaries()
    if missing:
        skip_or_fail(f"the S3 server is not installed: {', '.join(missing)}")
    server = Radosgw()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_environment(
    s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Radosgw:
    """The server, with the environment pointing boto3 at it as its first user."""
    for variable in AWS_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in s3_server.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # A node of its own: no retry budget, and no credentials, that another test shares.
    monkeypatch.setenv("PRETRAIN_NODE_DIR", str(tmp_path_factory.mktemp("node")))
    return s3_server


@pytest.fixture
def s3_bucket(s3_environment: Radosgw) -> str:
    """A fresh, empty bucket, as `s3://bucket`; the environment points at its server."""
    name = f"test-{uuid.uuid4().hex[:16]}"
    s3_environment.make_bucket(name)
    return f"s3://{name}"


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets: PRETRAIN_REAL_DATA, else shared/data beside the checkout."""
    named = os.environ.get("PRETRAIN_REAL_DATA")
    checkout = Path(__file__).resolve().parent.parent
    folder = Path(named) if named else checkout.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder; set PRETRAIN_REAL_DATA")
    return folder


@pytest.fixture
def proxy(s3_bucket: str, s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between this process and the store, for faults."""
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy
