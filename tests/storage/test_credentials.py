"""Credentials that expire: asked for once a node, renewed before they end, readable by nobody else, never printed."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import sys
import time
from pathlib import Path

import pytest
from services.radosgw import Keys, Radosgw

from pretrain.errors import AccessDeniedError, StorageError
from pretrain.storage import S3Settings, counters, open_storage

PROVIDER = """\
import json, os, sys, time
from datetime import datetime, timedelta, timezone
folder = {folder!r}
with open(folder + "/calls", "a") as log:
    log.write(f"{{os.getppid()}}\\n")
time.sleep({slow_seconds})
if os.path.exists(folder + "/broken"):
    print("cannot reach the vault with password hunter2-is-secret", file=sys.stderr)
    sys.exit(1)
until = datetime.now(timezone.utc) + timedelta(seconds={life_seconds})
print(json.dumps({{"Version": 1, "AccessKeyId": {keys.access_key!r}, "SecretAccessKey": {keys.secret_key!r},
                   "SessionToken": "", "Expiration": until.isoformat()}}))
"""


class Provider:
    """A real `credential_process`, which counts its calls."""

    def __init__(self, folder: Path, keys: Keys, *, life_seconds: float, slow_seconds: float = 0.2) -> None:
        self.folder = folder
        program = folder / "provider.py"
        program.write_text(
            PROVIDER.format(
                folder=str(folder), keys=keys, life_seconds=life_seconds, slow_seconds=slow_seconds
            )
        )
        (folder / "config").write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")

    @property
    def calls(self) -> int:
        log = self.folder / "calls"
        return len(log.read_text().split()) if log.exists() else 0

    def break_it(self) -> None:
        (self.folder / "broken").touch()


@pytest.fixture
def provider(s3_bucket: str, s3_server: Radosgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Provider:
    """In place of static keys, a slow process that gives them for two hours."""
    open_storage(s3_bucket).put("a", b"x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return Provider(tmp_path, Keys(s3_server.access_key, s3_server.secret_key), life_seconds=7200)


def node_files(pattern: str = "credentials-*") -> list[Path]:
    return sorted(
        path for path in Path(os.environ["PRETRAIN_NODE_DIR"]).glob(pattern) if path.suffix != ".lock"
    )


def _read(url: str, settings: S3Settings, times: int) -> None:
    store = open_storage(url, s3=settings)
    for _ in range(times):
        assert store.read("a") == b"x"
        time.sleep(0.1)


def in_processes(count: int, url: str, settings: S3Settings, times: int = 1) -> list[int | None]:
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_read, args=(url, settings, times)) for _ in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


@pytest.mark.parametrize(("shared", "calls"), [(True, 1), (False, 8)])
def test_eight_processes_ask_the_provider_once(
    provider: Provider, s3_bucket: str, shared: bool, calls: int
) -> None:
    assert in_processes(8, s3_bucket, S3Settings(share_credentials=shared)) == [0] * 8
    assert provider.calls == calls


def test_credentials_are_renewed_once_a_node_before_they_expire(
    provider: Provider, s3_bucket: str, s3_server: Radosgw, tmp_path: Path
) -> None:
    life = 6.0
    Provider(tmp_path, Keys(s3_server.access_key, s3_server.secret_key), life_seconds=life)
    started = time.monotonic()
    assert in_processes(4, s3_bucket, S3Settings(), times=120) == [0] * 4
    lives = (time.monotonic() - started) / (0.75 * life)
    assert 3 <= provider.calls <= 1.5 * lives + 2, "not once for each of four processes"


def test_the_file_is_for_this_user_only_and_holds_what_expires(provider: Provider, s3_bucket: str) -> None:
    assert open_storage(s3_bucket).read("a") == b"x"
    (path,) = node_files()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text())["method"] == "custom-process"


def test_a_folder_that_others_can_look_into_is_not_used(
    provider: Provider, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(os.environ["PRETRAIN_NODE_DIR"])
    for folder in ("open", "link"):
        monkeypatch.setenv("PRETRAIN_NODE_DIR", str(tmp_path / folder))
        assert open_storage(s3_bucket).read("a") == b"x"
        assert not any((tmp_path / folder).glob("credentials*"))
    assert provider.calls == 2


def test_static_credentials_are_not_copied(
    s3_bucket: str, s3_server: Radosgw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(s3_bucket).put("a", b"x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "keys").write_text(
        f"[default]\naws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    assert open_storage(s3_bucket).read("a") == b"x"
    assert node_files() == []


def test_another_way_to_get_credentials_has_a_file_of_its_own(
    provider: Provider, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(s3_bucket).read("a")
    with open(tmp_path / "config", "a") as config:
        config.write(f"[profile other]\ncredential_process = {sys.executable} {tmp_path / 'provider.py'}\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    open_storage(s3_bucket).read("a")
    assert provider.calls == len(node_files()) == 2


@pytest.mark.parametrize("junk", ["", "{}", "null", '{"access_key": 1}', "x" * 100])
def test_a_damaged_file_is_replaced(provider: Provider, s3_bucket: str, junk: str) -> None:
    open_storage(s3_bucket).read("a")
    node_files()[0].write_text(junk)
    assert open_storage(s3_bucket).read("a") == b"x"
    assert provider.calls == 2
    assert open_storage(s3_bucket).read("a") == b"x"
    assert provider.calls == 2


def test_a_provider_that_fails_at_the_start_is_refused_access_without_its_text(
    provider: Provider, s3_bucket: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    provider.break_it()
    with pytest.raises(
        AccessDeniedError, match="the provider 'custom-process' gave none; try it by hand"
    ) as caught:
        open_storage(s3_bucket).read("a")
    assert "hunter2" not in str(caught.value) + caplog.text + capfd.readouterr().err


def test_a_provider_that_fails_later_is_borne_while_the_old_ones_hold_and_then_waited_for(
    provider: Provider,
    s3_bucket: str,
    s3_server: Radosgw,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pretrain.storage.credentials._PAUSE_SECONDS", 0.5)
    monkeypatch.setattr("pretrain.storage.s3._EXPIRED_SECONDS", 2.0)
    Provider(tmp_path, Keys(s3_server.access_key, s3_server.secret_key), life_seconds=8.0)
    store = open_storage(s3_bucket, s3=S3Settings())
    assert store.read("a") == b"x"
    provider.break_it()
    end = time.monotonic() + 6.7
    while time.monotonic() < end:
        assert store.read("a") == b"x"
        time.sleep(0.05)
    assert 2 <= provider.calls < 10, "it is left alone between attempts"
    assert "could not be renewed" in caplog.text
    time.sleep(1.5)
    asked = time.monotonic()
    with pytest.raises(StorageError, match="credentials have expired, and their provider gives no new ones"):
        store.read("a")
    assert time.monotonic() - asked < 5.0, "not as long as a store that is away would be waited for"
    assert "hunter2" not in caplog.text
    assert s3_server.secret_key not in caplog.text
    (tmp_path / "broken").unlink()
    assert store.read("a") == b"x", "and all is well when it comes back"


def test_only_the_process_that_asked_counts_a_refresh(provider: Provider, s3_bucket: str) -> None:
    before = counters.snapshot()
    open_storage(s3_bucket).read("a")
    open_storage(s3_bucket).read("a")
    assert counters.since(before)["credential_refreshes"] == 1
