"""The chunk cache when those who work on it die or freeze: nothing is stuck, and what they left is taken over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from chunks_held import PLENTY, files_under, get, kill, whole

from pretrain.storage import ChunkCache
from pretrain.storage import cache as cache_module
from pretrain.storage import cache_files as cache_files_module


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
