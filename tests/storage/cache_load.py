"""Processes that work on one chunk cache together, and someone who watches its bytes. Used by test_cache_*.py.

Also run as a program, in a mount namespace with a file system of its own:

    python cache_load.py MOUNT_POINT MAX_BYTES PROCESSES SECONDS

where it prints, as JSON, the most bytes that the file system held: unlinked files that somebody has open
count there, as they do on a disk.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from pretrain.storage import ChunkCache, counters

KEYS = 300


def content(key: int) -> bytes:
    """What belongs under a key: from 1 to 200 kB, different for each."""
    size = 1000 + random.Random(key).randrange(200_000)
    return (key.to_bytes(4, "little") * (size // 4 + 1))[:size]


def use_for(root: Path, max_bytes: int, seconds: float, seed: int) -> None:
    """Read random chunks, wholly and in parts, and hold some open; every byte must be right."""
    draw, held = random.Random(seed), {}
    cache, end = ChunkCache(root, max_bytes=max_bytes), time.monotonic() + seconds
    while time.monotonic() < end:
        key = min(draw.randrange(KEYS), draw.randrange(KEYS))
        wanted = content(key)
        if key not in held:
            held[key] = cache.get(str(key), len(wanted), lambda key=key: content(key))
        start = draw.randrange(len(wanted))
        length = min(len(wanted) - start, draw.randrange(1, 50_000))
        got = held[key].read(start, length)
        if got is None:
            held.pop(key).close()  # evicted under us
        elif got != wanted[start : start + length]:
            os._exit(17)
        if len(held) > 20:
            held.pop(draw.choice(list(held))).close()
    if counters.snapshot()["cache_damaged"]:
        os._exit(18)


def start(root: Path, max_bytes: int, seconds: float, seed: int) -> BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=use_for, args=(root, max_bytes, seconds, seed))
    child.start()
    return child


def bytes_under(cache: ChunkCache) -> int:
    """What the cache's chunk files take on their disk, those that are being written included.

    Looked at while nobody may evict or begin a file, else what goes and what comes would both be counted.
    """
    taken: dict[int, int] = {}  # by inode: a file may be met before and after it gets its name
    with cache._files._account():
        for folder, _, names in os.walk(cache._files.root):
            for name in names:
                if name not in ("CACHEDIR.TAG", "account"):
                    with contextlib.suppress(FileNotFoundError):
                        status = os.stat(os.path.join(folder, name))
                        taken[status.st_ino] = status.st_blocks * 512
    return sum(taken.values())


def main() -> None:
    mount, max_bytes, processes, seconds = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    ChunkCache(mount / "chunks", max_bytes=max_bytes)
    children = [start(mount / "chunks", max_bytes, seconds, seed) for seed in range(processes)]
    most = samples = 0
    while any(child.is_alive() for child in children):
        status = os.statvfs(mount)
        most = max(most, (status.f_blocks - status.f_bfree) * status.f_frsize)
        samples += 1
    codes = [child.exitcode for child in children]
    print(json.dumps({"most_bytes": most, "samples": samples, "codes": codes}))


if __name__ == "__main__":
    main()
