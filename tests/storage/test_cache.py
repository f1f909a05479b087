"""The node's chunk cache: one fetch, whole files, a bound that holds, and a way round when it cannot."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import cache_load
import pytest
from cache_load import bytes_under

from pretrain.errors import UsageError
from pretrain.storage import ChunkCache, HeldChunk, counters, default_cache_bytes
from pretrain.storage import cache as cache_module
from pretrain.storage import cache_files as cache_files_module

PLENTY = 1 << 30
OWN = ["CACHEDIR.TAG", "account"]


def files_under(root: Path) -> list[str]:
    """Names of chunk files, whole and partial, below the cache's folder."""
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return [name for name in found if name not in OWN]


def get(cache: ChunkCache, key: str, data: bytes) -> HeldChunk:
    return cache.get(key, len(data), lambda: data)


def whole(held: HeldChunk, size: int) -> bytes | None:
    data = held.read(0, size)
    return None if data is None else bytes(data)


def never() -> bytes:
    raise AssertionError("it is in the cache, and must not be fetched")


def test_a_key_is_fetched_once_and_its_file_holds_the_bytes(tmp_path: Path) -> None:
    before = counters.snapshot()
    cache = ChunkCache(tmp_path / "made" / "on demand", max_bytes=PLENTY)
    assert whole(get(cache, "s3://bucket/shard.tar@0", b"chunk"), 5) == b"chunk"
    assert whole(cache.get("s3://bucket/shard.tar@0", 5, never), 5) == b"chunk"
    again = ChunkCache(tmp_path / "made" / "on demand", max_bytes=PLENTY)
    assert whole(again.get("s3://bucket/shard.tar@0", 5, never), 5) == b"chunk"
    assert bytes(again.get("s3://bucket/shard.tar@0", 5, never).read(1, 3)) == b"hun"
    assert whole(get(cache, "s3://bucket/shard.tar@8", b"other"), 5) == b"other"
    spent = counters.since(before)
    assert (spent["cache_misses"], spent["cache_hits"], spent["cache_bypasses"]) == (2, 3, 0)


def test_any_string_makes_a_key(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path / "c", max_bytes=PLENTY)
    keys = ["", "../../escape", "/absolute", "a" * 10_000, "ä\0\n"]
    held = [get(cache, key, key.encode() or b"-") for key in keys]
    assert [whole(one, len(key.encode() or b"-")) for one, key in zip(held, keys, strict=True)] == [
        key.encode() or b"-" for key in keys
    ]
    assert len(files_under(tmp_path / "c")) == len(keys)
    assert os.listdir(tmp_path) == ["c"]


def test_threads_that_want_one_key_wait_for_one_fetch(tmp_path: Path) -> None:
    fetches = []

    def fetch() -> bytes:
        fetches.append(1)
        time.sleep(0.05)
        return b"x" * 100_000

    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(lambda _: cache.get("key", 100_000, fetch), range(8)))
    assert len(fetches) == 1
    assert {whole(one, 100_000) for one in held} == {b"x" * 100_000}
    assert len(files_under(tmp_path)) == 1


def _get_all(root: Path, log: Path, keys: int) -> None:
    cache = ChunkCache(root, max_bytes=PLENTY)

    def fetch(key: int) -> bytes:
        with open(log, "a") as file:
            file.write(f"{key}\n")
        return bytes([key]) * 50_000

    for key in range(keys):
        held = cache.get(str(key), 50_000, lambda key=key: fetch(key))
        assert whole(held, 50_000) == bytes([key]) * 50_000


def test_processes_share_each_fetch_and_never_see_part_of_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_get_all, args=(tmp_path / "cache", tmp_path / "log", 40)) for _ in range(8)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 8
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(40))
    assert len(files_under(tmp_path / "cache")) == 40


def test_a_fetch_that_fails_leaves_nothing_and_the_next_caller_tries_again(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)

    def fail() -> bytes:
        raise ConnectionError("as if the store were gone")

    with pytest.raises(ConnectionError):
        cache.get("key", 3, fail)
    assert files_under(tmp_path) == []
    assert whole(get(cache, "key", b"now"), 3) == b"now"


def test_a_waiter_takes_over_when_the_fetch_it_waited_for_fails(tmp_path: Path) -> None:
    cache, fetching, waiting = ChunkCache(tmp_path, max_bytes=PLENTY), threading.Event(), threading.Event()

    def fail_late() -> bytes:
        fetching.set()
        waiting.wait(5)
        time.sleep(0.05)  # the other one waits by now; if not, it still must succeed
        raise ConnectionError("late")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "key", 6, fail_late)
        fetching.wait(5)
        second = pool.submit(get, cache, "key", b"second")
        waiting.set()
        assert isinstance(first.exception(), ConnectionError)
        assert whole(second.result(), 6) == b"second"
    assert len(files_under(tmp_path)) == 1


# -- those who die -------------------------------------------------------------------------------------------


def _run(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.Process, Event]:
    context = multiprocessing.get_context("fork")
    inside = context.Event()
    child = context.Process(target=target, args=(*arguments, inside))
    child.start()
    assert inside.wait(10)
    return child, inside


def _hang_in_fetch(root: Path, inside: Event) -> None:
    def fetch() -> bytes:
        inside.set()
        time.sleep(60)
        return b"never"

    ChunkCache(root, max_bytes=PLENTY).get("key", 5, fetch)


def _hang_in_writing(root: Path, inside: Event) -> None:
    def hang(*arguments: object) -> int:
        inside.set()
        time.sleep(60)
        return 0

    os.pwrite_before, cache_module.os.pwrite = (
        os.pwrite,
        lambda *a: hang() if len(a[1]) > 100 else os.pwrite_before(*a),
    )
    get(ChunkCache(root, max_bytes=PLENTY), "key", b"x" * 500_000)


def kill(child: multiprocessing.Process) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.join()


@pytest.mark.parametrize("hang", [_hang_in_fetch, _hang_in_writing])
def test_what_a_killed_process_left_is_collected_and_a_living_ones_is_not(
    tmp_path: Path, hang: Callable[..., None]
) -> None:
    child, _ = _run(hang, tmp_path)
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    assert len(files_under(tmp_path)) == 1, "its writer lives"
    booked = cache.used_bytes()
    assert booked == (503_808 if hang is _hang_in_writing else 0), "room is taken before bytes are written"
    kill(child)
    assert len(files_under(tmp_path)) == 1
    assert ChunkCache(tmp_path, max_bytes=PLENTY).used_bytes() == 0
    assert files_under(tmp_path) == []


def test_a_dead_writers_file_is_taken_over_by_the_next_who_wants_the_key(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    child, _ = _run(_hang_in_writing, tmp_path)
    kill(child)
    assert whole(get(cache, "key", b"whole"), 5) == b"whole"
    assert cache.used_bytes() == 4096
    assert len(files_under(tmp_path)) == 1


def test_a_dead_writers_bytes_are_set_free_when_they_are_needed(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=600_000)
    child, _ = _run(_hang_in_writing, tmp_path)
    kill(child)
    assert not get(cache, "other", b"y" * 400_000).in_memory
    assert cache.used_bytes() == 401_408


def _die_in_the_account(root: Path, inside: Event) -> None:
    cache = ChunkCache(root, max_bytes=PLENTY)
    with cache._files._account() as account:
        account.add(123 << 20)
        inside.set()
        time.sleep(60)


def test_an_account_that_a_kill_left_unfinished_is_counted_anew(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    get(cache, "a", b"x" * 10_000)
    child, _ = _run(_die_in_the_account, tmp_path)
    kill(child)
    assert cache.used_bytes() > 123 << 20
    get(cache, "b", b"x" * 10_000)
    assert cache.used_bytes() == 2 * 12288


def test_a_frozen_neighbour_is_gone_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_files_module, "_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(cache_module, "_WAIT_SECONDS", 0.3)
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    holder, _ = _run(_die_in_the_account, tmp_path)
    fetcher, _ = _run(_hang_in_fetch, tmp_path)
    for child in (holder, fetcher):
        os.kill(child.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        for key in ("key", "another"):
            held = get(cache, key, b"fetched")
            assert held.in_memory
            assert whole(held, 7) == b"fetched"
        assert time.monotonic() - started < 5
        assert "does not move on" in caplog.text
        assert "for too long" in caplog.text
    finally:
        for child in (holder, fetcher):
            kill(child)
    assert not get(cache, "key", b"fetched").in_memory, "the dead hold no lock"


# -- the bound -----------------------------------------------------------------------------------------------


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
    assert kills > 30
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
        pytest.skip("mounting a file system of its own needs root")
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


# -- damage, and folders that cannot be one ------------------------------------------------------------------


def test_a_discarded_file_is_fetched_again(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    get(cache, "key", b"damaged")
    cache.discard("key")
    cache.discard("never there")
    assert whole(get(cache, "key", b"good"), 4) == b"good"
    assert cache.used_bytes() == 4096


def test_a_file_that_a_crash_cut_short_is_fetched_again(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, max_bytes=PLENTY)
    get(cache, "key", b"x" * 9000)
    os.truncate(tmp_path / files_under(tmp_path)[0], 100)
    assert whole(get(cache, "key", b"x" * 9000), 9000) == b"x" * 9000


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_made_is_wrong_usage_that_names_it(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"chunk cache .*{place}: .*; choose a data.cache_dir"):
        ChunkCache(tmp_path / place, max_bytes=PLENTY)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds something else \(thesis.txt\); choose another"):
        ChunkCache(tmp_path, max_bytes=PLENTY)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_the_default_bound_counts_what_the_cache_holds_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 50_000_000

    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: Usage)
    assert default_cache_bytes(tmp_path / "not" / "there") == 25_000_000
    get(ChunkCache(tmp_path, max_bytes=PLENTY), "key", b"x" * 40_960)
    Usage.free -= 40_960
    assert default_cache_bytes(tmp_path) == 25_000_000
    Usage.free = 1 << 50
    assert default_cache_bytes(tmp_path) == 64 << 30
