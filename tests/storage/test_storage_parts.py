"""Parts that need no server: URLs, retries, what is special to local disk, what is not imported."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.errors import AccessDeniedError, StorageError, UsageError
from pretrain.storage import (
    ObjectInfo,
    RetryPolicy,
    S3Settings,
    is_remote,
    join_url,
    open_storage,
    split_url,
)
from pretrain.storage.retry import Retries


@pytest.mark.parametrize(
    ("url", "parent", "name"),
    [
        ("s3://bucket/prefix/x.tar", "s3://bucket/prefix", "x.tar"),
        ("s3://bucket/x/", "s3://bucket", "x"),
        ("s3://bucket", "s3://bucket", ""),
        ("/a/b/c.tar", "/a/b", "c.tar"),
        ("/a", "/", "a"),
        ("/", "/", ""),
        ("a/b/", "a", "b"),
        ("x.tar", ".", "x.tar"),
        ("file:///a/b", "file:///a", "b"),
        ("file:///a", "file:///", "a"),
    ],
)
def test_a_url_splits_into_parent_and_name_and_joins_again(url: str, parent: str, name: str) -> None:
    assert split_url(url) == (parent, name)
    if name and parent != ".":
        assert join_url(parent, name) == url.rstrip("/")
    assert is_remote(url) == url.startswith("s3://")


def test_joining_adds_each_name_below_the_last() -> None:
    assert join_url("s3://bucket/p/", "x", "y") == "s3://bucket/p/x/y"
    assert join_url("folder", "x") == "folder/x"


def test_stores_say_their_url_without_a_slash_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_storage("s3://bucket/").url == "s3://bucket"
    assert open_storage("s3://bucket/a/b/").url == "s3://bucket/a/b"
    assert open_storage(f"file://{tmp_path}/a/").url == f"{tmp_path}/a"
    monkeypatch.chdir(tmp_path)
    relative = open_storage("a/b/")
    monkeypatch.chdir("/")
    assert relative.url == f"{tmp_path}/a/b", "a later change of folder does not move it"


@pytest.mark.parametrize("url", ["gs://bucket/a", "https://host/a", "s3://", "s3:///a", "file://a/b", ""])
def test_a_url_of_no_known_store_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match=r"; use|; write|no bucket"):
        open_storage(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="holds credentials") as caught:
        open_storage("s3://KEY:topsecret@bucket/prefix")
    assert "topsecret" not in str(caught.value)


def test_settings_that_boto3_does_not_know_are_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'paths'; use one of auto, path, virtual"):
        open_storage("s3://bucket", s3=S3Settings(addressing_style="paths")).exists("a")
    monkeypatch.setenv("PRETRAIN_S3_CHECKSUMS", "never")
    with pytest.raises(UsageError, match="PRETRAIN_S3_CHECKSUMS or its setting is 'never'"):
        open_storage("s3://bucket").exists("a")


def test_importing_storage_imports_neither_torch_nor_boto3() -> None:
    code = "import sys, pretrain.storage; print(sorted({'torch', 'boto3', 'botocore'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def test_attempts_are_counted_and_delays_stay_in_their_bounds() -> None:
    time = FakeTime()
    policy = RetryPolicy(attempts=50, seconds=1e9, first_delay_seconds=0.5, longest_delay_seconds=4.0)
    retries = Retries(policy, sleep=time.sleep, clock=time.clock)
    while retries.try_again():
        pass
    assert retries.failures == 50
    assert len(time.slept) == 49
    assert all(0.5 <= delay <= 4.0 for delay in time.slept)
    assert all(later <= 3 * earlier for earlier, later in zip(time.slept, time.slept[1:], strict=False))
    assert len(set(time.slept)) > 10, "jitter: two readers do not wait alike"


def test_no_wait_reaches_beyond_the_time_allowed() -> None:
    time = FakeTime()
    retries = Retries(RetryPolicy(attempts=10_000, seconds=20.0), sleep=time.sleep, clock=time.clock)
    while retries.try_again():
        pass
    assert 10.0 < time.now <= 20.0


def test_progress_gives_a_request_all_its_attempts_back() -> None:
    time = FakeTime()
    retries = Retries(RetryPolicy(attempts=2), sleep=time.sleep, clock=time.clock)
    for _ in range(5):
        assert retries.try_again()
        retries.progressed()
    assert retries.try_again()
    assert not retries.try_again()


def test_a_policy_without_an_attempt_is_refused() -> None:
    with pytest.raises(ValueError, match="attempts=0"):
        RetryPolicy(attempts=0)


# -- local disk ----------------------------------------------------------------------------------------------


def test_a_local_store_gives_paths_and_a_remote_one_none(tmp_path: Path) -> None:
    assert open_storage(str(tmp_path)).local_path("a/b") == tmp_path / "a" / "b"
    assert open_storage("s3://bucket").local_path("a/b") is None


def test_a_local_listing_follows_links_once_and_skips_broken_ones(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "shard.tar").write_bytes(b"123")
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "loop").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "gone").symlink_to(tmp_path / "nothing")
    assert list(open_storage(str(root)).list()) == [ObjectInfo(name="linked/shard.tar", size=3)]


def test_what_a_killed_writer_left_beside_its_target_is_not_listed(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path))
    store.put("a", b"")
    (tmp_path / ".partial-0123").write_bytes(b"half")
    assert [info.name for info in store.list()] == ["a"]
    with pytest.raises(StorageError, match="kept for unfinished files"):
        store.put(".partial-mine", b"")


def test_a_put_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path))
    store.put("a", b"old")
    with pytest.raises(StorageError, match="a folder, not a file"):
        store.put("a", tmp_path)  # a source that opens, and cannot be read
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_disk_that_refuses_bytes_in_mid_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path))
    store.put("a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a disk with little room left
    try:
        with pytest.raises(StorageError, match=r"/a: File too large; check the disk"):
            store.put("a", bytes(1_000_000))
        with pytest.raises(StorageError, match=r"/b: File too large; check the disk"):
            store.put_if_absent("b", bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_local_file_without_permission_is_access_denied(tmp_path: Path) -> None:
    store = open_storage(str(tmp_path / "mine"))
    store.put("a", b"x")
    (tmp_path / "mine").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything: be nobody for a moment
    try:
        for ask in (lambda: store.read("a"), lambda: list(store.list()), lambda: store.put("b", b"")):
            with pytest.raises(AccessDeniedError, match="permission denied"):
                ask()
    finally:
        os.seteuid(user)
        (tmp_path / "mine").chmod(0o700)
