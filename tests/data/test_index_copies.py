"""A node's copies of an index when its disk errs or is full, and when a process that fetches one is frozen."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from services.required import skip_or_fail
from test_index_format import entry, write

from pretrain.data import index_cache
from pretrain.data.index import open_index, open_samples
from pretrain.storage import open_storage


@pytest.fixture
def url(s3_bucket: str, tmp_path: Path) -> str:
    write(tmp_path / "set", entry(0, [0, 1, 2, 3]), entry(1, [0, 1]))
    for path in (tmp_path / "set").iterdir():
        open_storage(s3_bucket).put(path.name, path)
    return s3_bucket


def test_a_copy_of_the_samples_that_the_disk_damaged_is_fetched_again(url: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    index = open_index(url, cache_dir=cache)
    before = set((cache / "indexes").glob("*.safetensors"))
    wanted = list(open_samples(index, cache_dir=cache).keys)
    (copy,) = set((cache / "indexes").glob("*.safetensors")) - before
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1  # in the last key
    copy.write_bytes(data)
    assert list(open_samples(index, cache_dir=cache).keys) == wanted


def hold_up(url: str, cache: Path) -> None:
    def frozen(name: str) -> object:
        yield b"half of it"
        (cache / "holding").touch()
        os.kill(os.getpid(), signal.SIGSTOP)
        yield b"the other half"

    storage = open_storage(url)
    storage.stream = frozen  # type: ignore[method-assign]
    index_cache.fetched(storage, "index.safetensors", version="another", cache_dir=cache)


def test_a_process_frozen_while_it_fetches_does_not_hold_up_the_others(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_cache, "_STALLED_SECONDS", 0.5)
    cache = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(target=hold_up, args=(url, cache))
    process.start()
    try:
        while not (cache / "holding").exists():
            assert process.is_alive()
            time.sleep(0.05)
        started = time.monotonic()
        assert open_index(url, cache_dir=cache).num_samples == 6
        assert time.monotonic() - started < 30
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode == 0
        assert open_index(url, cache_dir=cache).num_samples == 6
    finally:
        process.kill()
        process.join()
    assert not list((cache / "indexes").glob("*fetching*"))


READ = """
import os, sys
from pathlib import Path
from pretrain.data.index import open_index, open_samples
cache = Path(sys.argv[2]) / "cache"
cache.mkdir()
other = os.open(Path(sys.argv[2]) / "other", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        os.write(other, bytes(4096))
except OSError:
    pass
index = open_index(sys.argv[1], cache_dir=cache)
print(index.num_samples, list(open_samples(index, cache_dir=cache).keys)[-1])
print([path.name for path in (cache / "indexes").glob("*") if path.stat().st_size])
"""


def test_on_a_full_disk_an_index_is_held_in_memory_and_said_to_be(url: str, tmp_path: Path) -> None:
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        skip_or_fail("mounting a file system of its own needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    script = f'mount -t tmpfs -o size=1m none "{mount}" && exec "$@"'
    command = [sys.executable, "-c", READ, url, str(mount)]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["6 1/k1", "[]"]
    assert "No space left on device" in done.stderr
    assert "held in memory" in done.stderr
