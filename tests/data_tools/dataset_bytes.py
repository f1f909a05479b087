"""Contents of folders and buckets, to compare datasets byte by byte, and processes that can be killed. For tests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.storage import open_storage


def contents(url: Path | str) -> dict[str, bytes]:
    """Name -> bytes of all objects under a folder or a bucket's prefix."""
    storage = open_storage(str(url))
    return {info.name: storage.read(info.name) for info in storage.list()}


def start(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pretrain.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(true: Callable[[], object], process: subprocess.Popen[bytes], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)
