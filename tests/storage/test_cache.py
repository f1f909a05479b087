"""The node's file cache: one fetch, whole files, no junk left by the dead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from pretrain.errors import StorageError
from pretrain.storage import FileCache


def files_under(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_key_is_fetched_once_and_its_file_holds_the_bytes(tmp_path: Path) -> None:
    fetches = []

    def fetch() -> bytes:
        fetches.append(1)
        return b"chunk"

    cache = FileCache(tmp_path / "made" / "on demand")
    path = cache.get("s3://bucket/shard.tar@0", fetch)
    assert path.read_bytes() == b"chunk"
    assert cache.get("s3://bucket/shard.tar@0", fetch) == path
    assert FileCache(cache.root).get("s3://bucket/shard.tar@0", fetch) == path
    assert len(fetches) == 1
    assert cache.get("s3://bucket/shard.tar@8", lambda: b"other").read_bytes() == b"other"


def test_any_string_makes_a_key(tmp_path: Path) -> None:
    cache = FileCache(tmp_path)
    keys = ["", "../../escape", "/absolute", "a" * 10_000, "ä\0\n"]
    paths = [cache.get(key, lambda key=key: key.encode()) for key in keys]
    assert [path.read_bytes() for path in paths] == [key.encode() for key in keys]
    assert all(tmp_path in path.parents for path in paths)


def test_threads_that_want_one_key_wait_for_one_fetch(tmp_path: Path) -> None:
    fetches = []

    def fetch() -> bytes:
        fetches.append(1)
        time.sleep(0.05)
        return b"x" * 100_000

    cache = FileCache(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: cache.get("key", fetch), range(8)))
    assert len(fetches) == 1
    assert len(set(paths)) == 1
    assert files_under(tmp_path) == [paths[0]]


def _get_all(root: Path, log: Path, keys: int) -> None:
    cache = FileCache(root)

    def fetch(key: int) -> bytes:
        with open(log, "a") as file:
            file.write(f"{key}\n")
        return bytes([key]) * 50_000

    for key in range(keys):
        assert cache.get(str(key), lambda key=key: fetch(key)).read_bytes() == bytes([key]) * 50_000


def test_processes_share_each_fetch_and_never_see_part_of_a_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_get_all, args=(tmp_path / "cache", tmp_path / "log", 40)) for _ in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(40))
    assert len(files_under(tmp_path / "cache")) == 40


def test_a_fetch_that_fails_leaves_nothing_and_the_next_caller_tries_again(tmp_path: Path) -> None:
    cache = FileCache(tmp_path)

    def fail() -> bytes:
        raise ConnectionError("as if the store were gone")

    with pytest.raises(ConnectionError):
        cache.get("key", fail)
    assert files_under(tmp_path) == []
    assert cache.get("key", lambda: b"now").read_bytes() == b"now"


def test_a_waiter_takes_over_when_the_fetch_it_waited_for_fails(tmp_path: Path) -> None:
    cache, fetching, waiting = FileCache(tmp_path), threading.Event(), threading.Event()

    def fail_late() -> bytes:
        fetching.set()
        waiting.wait(5)
        time.sleep(0.05)  # the other one is at the lock by now; if not, it still must succeed
        raise ConnectionError("late")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "key", fail_late)
        fetching.wait(5)
        second = pool.submit(cache.get, "key", lambda: b"second")
        waiting.set()
        assert isinstance(first.exception(), ConnectionError)
        assert second.result().read_bytes() == b"second"
    assert files_under(tmp_path) == [second.result()]


def _hang_in_fetch(root: Path, inside: Event) -> None:
    def fetch() -> bytes:
        inside.set()
        time.sleep(60)
        return b"never"

    FileCache(root).get("key", fetch)


def test_what_a_killed_process_left_is_collected_and_a_living_ones_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    inside = context.Event()
    child = context.Process(target=_hang_in_fetch, args=(tmp_path, inside))
    child.start()
    assert inside.wait(10)
    FileCache(tmp_path)
    assert len(files_under(tmp_path)) == 1, "its writer lives"
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert len(files_under(tmp_path)) == 1
    FileCache(tmp_path)
    assert files_under(tmp_path) == []


def test_bytes_of_a_dead_writer_do_not_end_up_in_the_next_ones_file(tmp_path: Path) -> None:
    cache = FileCache(tmp_path)
    path = cache.get("key", lambda: b"")
    path.rename(f"{path}.partial")
    Path(f"{path}.partial").write_bytes(b"half of something long")
    assert cache.get("key", lambda: b"whole").read_bytes() == b"whole"
    assert files_under(tmp_path) == [path]


def test_a_discarded_file_is_fetched_again(tmp_path: Path) -> None:
    cache = FileCache(tmp_path)
    cache.get("key", lambda: b"damaged")
    cache.discard("key")
    cache.discard("never there")
    assert cache.get("key", lambda: b"good").read_bytes() == b"good"


def test_a_cache_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cache .*/file/cache: .*; check the folder"):
        FileCache(tmp_path / "file" / "cache")
