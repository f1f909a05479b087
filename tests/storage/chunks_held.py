"""Put chunks into a cache, look at what it holds, kill who works on it. Used by test_cache*.py."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

from pretrain.storage import ChunkCache, HeldChunk

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


def kill(child: multiprocessing.Process) -> None:
    os.kill(child.pid, signal.SIGKILL)
    child.join()
