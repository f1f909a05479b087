"""The services that tests stand on: started by hand as well, and never missing in silence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from services.radosgw import missing_binaries
from services.required import skip_or_fail

from pretrain.storage import open_storage

TESTS = Path(__file__).resolve().parent.parent
ONE_S3_TEST = f"{TESTS}/storage/test_stores.py::test_an_empty_object_is_an_object[s3]"


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_missing_server_skips_and_fails_where_services_are_required(
    required: str, outcome: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PATH": "/nowhere", "PRETRAIN_REQUIRE_SERVICES": required}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        tmp_path / "t",
        ONE_S3_TEST,
    ]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert outcome in done.stdout
    assert "the S3 server is not installed: ceph, " in done.stdout


def processes_under(folder: Path) -> list[int]:
    """Process ids of those whose configuration lies in `folder`."""
    needle = f"CEPH_CONF={folder}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and needle in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended, or is not ours
    return found


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_server_started_by_hand_serves_and_leaves_no_process(
    end: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing_binaries():
        skip_or_fail(f"the S3 server is not installed: {', '.join(missing_binaries())}")
    folder = tmp_path / "server"
    command = [sys.executable, TESTS / "services" / "radosgw.py", "--serve", folder, "--bucket", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith("#"):
                break
            name, value = re.fullmatch(r"export (\w+)=(\S+)\n", line).groups()
            monkeypatch.setenv(name, value)
        assert len(processes_under(folder)) == 3
        store = open_storage("s3://mine")
        store.put("a", b"x")
        assert store.read("a") == b"x"
        server.send_signal(end)
    assert server.returncode == (0 if end is signal.SIGINT else -signal.SIGKILL)
    for _ in range(100):
        if not processes_under(folder):
            break
        signal.sigtimedwait([], 0.1)
    assert processes_under(folder) == []
