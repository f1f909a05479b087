"""The chunk cache's bound: who goes first, and that it holds at every moment, whoever works and whoever is killed."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cache_load
import pytest
from cache_load import bytes_under
from chunks_held import PLENTY, files_under, get, kill, never, whole
from services.required import skip_or_fail

from pretrain.storage import ChunkCache


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=10 * 4096)
    for key in range(10):
        get(cache, str(key), b"x").close()
        time.sleep(0.002)
    cache.get("0", 1, never).close()
    time.sleep(0.002)
    for key in range(10, 14):
        get(cache, str(key), b"x").close()
    assert [key for key in range(14) if cache.holds(str(key))] == [0, *range(5, 14)]
    assert cache.used_bytes() == 10 * 4096 == bytes_under(cache)


def test_an_evicted_file_takes_no_disk_even_while_somebody_has_it_open(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=100_000)
    held = get(cache, "first", b"x" * 80_000)
    assert whole(held, 80_000) == b"x" * 80_000
    time.sleep(0.01)
    get(cache, "second", b"y" * 80_000)
    assert held.read(0, 80_000) is None, "it says so, and does not give something else"
    assert held.read(5, 1) is None
    assert os.fstat(held._descriptor).st_blocks == 0
    assert not cache.holds("first")


def test_a_file_that_is_being_read_is_not_evicted(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=100_000)
    held = get(cache, "first", b"x" * 80_000)
    fcntl.flock(held._descriptor, fcntl.LOCK_SH)  # as a reader has it for the time of one read
    other = get(cache, "second", b"y" * 80_000)
    assert other.in_memory, "slow, and not stuck"
    assert whole(other, 80_000) == b"y" * 80_000
    fcntl.flock(held._descriptor, fcntl.LOCK_UN)
    assert whole(held, 80_000) == b"x" * 80_000
    assert not get(cache, "second", b"y" * 80_000).in_memory


def test_a_chunk_larger_than_the_bound_stays_in_memory_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ChunkCache(tmp_path, max_bytes=10_000)
    get(cache, "small", b"x" * 5000)
    held = get(cache, "large", b"y" * 20_000)
    assert held.in_memory
    assert whole(held, 20_000) == b"y" * 20_000
    assert "no room for 20000 bytes under its bound of 10000" in caplog.text
    assert cache.holds("small"), "nothing is evicted for what cannot fit"


def test_a_cache_that_shrank_is_brought_under_its_new_bound(tmp_path: Path) -> None:
    for key in range(20):
        get(ChunkCache(tmp_path, max_bytes=PLENTY), str(key), b"x" * 10_000)
    small = ChunkCache(tmp_path, max_bytes=50_000)
    get(small, "new", b"x" * 10_000)
    assert 0 < bytes_under(small) <= 50_000


def test_the_bound_holds_at_every_moment_while_eight_processes_work(tmp_path: Path) -> None:
    bound = 8 << 20  # of about 30 MB that they want
    cache = ChunkCache(tmp_path, max_bytes=bound)
    children = [cache_load.start(tmp_path, bound, 6.0, seed) for seed in range(8)]
    most = samples = 0
    while any(child.is_alive() for child in children):
        most, samples = max(most, bytes_under(cache)), samples + 1
    assert [child.exitcode for child in children] == [0] * 8
    assert samples > 100
    assert bound // 2 < most <= bound
    assert not files_under(tmp_path / "partial")


def test_a_storm_of_kills_leaves_right_bytes_a_right_account_and_the_bound(tmp_path: Path) -> None:
    bound = 8 << 20
    cache = ChunkCache(tmp_path, max_bytes=bound)
    readers = [cache_load.start(tmp_path, bound, 8.0, seed) for seed in range(4)]
    victims = [cache_load.start(tmp_path, bound, 60.0, 100 + seed) for seed in range(4)]
    kills = most = 0
    while any(reader.is_alive() for reader in readers):
        time.sleep(0.001 * (kills % 50))
        victim = victims.pop(0)
        assert victim.exitcode is None, "nobody finds wrong bytes"
        kill(victim)
        kills += 1
        victims.append(cache_load.start(tmp_path, bound, 60.0, 100 + kills))
        most = max(most, bytes_under(cache))
    for victim in victims:
        kill(victim)
    assert [reader.exitcode for reader in readers] == [0] * 4
    assert kills > 8  # in 8 s; some 100 on an idle machine, fewer where others compute
    assert bound // 2 < most <= bound
    # The survivor needs no restart and no repair: it evicts what the dead left as well.
    for key in range(cache_load.KEYS):
        data = cache_load.content(key)
        held = cache.get(str(key), len(data), lambda data=data: data)
        assert not held.in_memory
        assert whole(held, len(data)) == data
        held.close()
    ChunkCache(tmp_path, max_bytes=bound)
    assert files_under(tmp_path / "partial") == []
    assert cache.used_bytes() == sum(
        -(-(tmp_path / name).stat().st_size // 4096) * 4096 for name in files_under(tmp_path)
    )


def in_a_file_system_of(size_bytes: int, mount: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run with a file system of that size at `mount`, seen by that process only; skipped without the right."""
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        skip_or_fail("mounting a file system of its own needs root")
    script = f'mount -t tmpfs -o size={size_bytes} none "{mount}" && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_not_even_deleted_files_that_are_open_exceed_the_bound(tmp_path: Path) -> None:
    bound = 8 << 20
    done = in_a_file_system_of(
        64 << 20, tmp_path, [sys.executable, cache_load.__file__, str(tmp_path), str(bound), "8", "5"]
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["codes"] == [0] * 8
    assert result["samples"] > 1000
    # Beside the chunks there are the tag and the account, a page each.
    assert bound // 2 < result["most_bytes"] <= bound + 2 * 4096


def test_a_full_disk_evicts_and_goes_on(tmp_path: Path) -> None:
    done = in_a_file_system_of(
        4 << 20, tmp_path, [sys.executable, cache_load.__file__, str(tmp_path), str(1 << 30), "4", "4"]
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["codes"] == [0] * 4, "all bytes were right, and nobody crashed"
    assert result["most_bytes"] > 3 << 20
    assert "Traceback" not in done.stderr


def test_a_cache_that_is_removed_under_its_users_is_made_again(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "c", max_bytes=PLENTY)
    get(cache, "a", b"x")
    subprocess.run(["rm", "-rf", tmp_path / "c"], check=True)
    assert whole(get(cache, "a", b"x"), 1) == b"x"
    assert not get(cache, "a", b"x").in_memory
    assert ChunkCache(tmp_path / "c", max_bytes=PLENTY).used_bytes() == 4096
