"""The node's chunk cache: one fetch, whole files, and a way round where it cannot be."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chunks_held import PLENTY, files_under, get, never, whole

from pretrain.errors import UsageError
from pretrain.storage import ChunkCache, counters, default_cache_bytes
from pretrain.storage import cache as cache_module


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
