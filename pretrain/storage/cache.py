"""A node's chunks on its disk, under a bound that holds at every moment. Used by data/reader.py.

One fetch serves all processes: who comes first writes the file under a lock, the others wait for it. Room
is made by evicting what was unused for longest. A cache smaller than what is worked on is slow, and one that
cannot take a chunk at all (a full disk, a chunk larger than the bound, a frozen neighbour) is gone round:
the chunk stays in this process's memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.storage import counters
from pretrain.storage.cache_files import CacheBusyError, CacheFiles
from pretrain.storage.node import is_at, locked

MAX_DEFAULT_BYTES = 64 << 30
_WAIT_SECONDS = 120.0  # for another's fetch of the same chunk; then it is fetched once more
_POLL_SECONDS = (0.001, 0.05)
_TOUCH_SECONDS = 10.0  # how exactly "unused for longest" is known
_EVICTION_SECONDS = 0.05  # more than it takes to empty a file, or to see that it is finished
_LOGGER = logging.getLogger(__name__)


def default_cache_bytes(folder: Path) -> int:
    """64 GiB, or half of what the disk would have free without this cache if that is less.

    What the cache holds already counts as free, so that the bound of a second start is that of the first.
    """
    here = Path(folder).absolute()
    while not here.exists():
        here = here.parent
    held = 0
    with contextlib.suppress(OSError):
        held = CacheFiles.glance(Path(folder))
    return min(MAX_DEFAULT_BYTES, (shutil.disk_usage(here).free + held) // 2)


class HeldChunk:
    """One chunk as a process holds it: an open file of the cache, or bytes in memory.

    An open file may be emptied by an eviction at any time; `read` then says so.
    """

    def __init__(self, *, descriptor: int | None = None, data: bytes | None = None) -> None:
        self._descriptor, self._touched = descriptor, time.monotonic()
        self.fresh = data  # the whole, where this process has just fetched it; a file's may be dropped
        self.in_memory = descriptor is None

    def read(self, offset: int, length: int) -> bytes | memoryview | None:
        """Bytes of the chunk; None when it has been evicted, or is just being."""
        if self._descriptor is None:
            assert self.fresh is not None, "a chunk is in a file or in memory"
            return memoryview(self.fresh)[offset : offset + length]
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            # It is being evicted, or one who waited for it looks at it for a moment.
            with locked(self._descriptor, seconds=_EVICTION_SECONDS, shared=True) as ours:
                return self._pread(offset, length) if ours else None
        try:
            return self._pread(offset, length)
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _pread(self, offset: int, length: int) -> bytes | None:
        assert self._descriptor is not None, "memory is not read from a disk"
        data = os.pread(self._descriptor, length, offset)
        if time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touch()
        return data if len(data) == length else None

    def _touch(self) -> None:
        assert self._descriptor is not None, "memory has no age"
        self._touched = time.monotonic()
        os.utime(self._descriptor)  # not left to the file system, which may note reads once a day

    def forget_fresh(self) -> None:
        """Drop the second copy in memory."""
        if self._descriptor is not None:
            self.fresh = None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class ChunkCache:
    """A folder of at most `max_bytes`, shared by any number of threads and processes of a machine.

    Raises UsageError where the folder cannot be written, or holds something else.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._files = CacheFiles(root, max_bytes=max_bytes)
        self._warned: set[str] = set()
        # What the dead left costs room that the living could use; there is seldom any.
        with contextlib.suppress(OSError, CacheBusyError):
            self._files.collect()

    @property
    def max_bytes(self) -> int:
        return self._files.max_bytes

    def used_bytes(self) -> int:
        """What its files take on the disk at this moment, those being written included."""
        return CacheFiles.glance(self._files.root)

    def holds(self, key: str) -> bool:
        """Whether there is a file for the key now."""
        return os.path.exists(self._files.path(_name(key)))

    def get(self, key: str, size: int, fetch: Callable[[], bytes]) -> HeldChunk:
        """The chunk of `key`, of `size` bytes; `fetch` is called if it is not there.

        What `fetch` raises is passed on, and nothing is kept.
        """
        name, claim = _name(key), None
        with self._unless_it_cannot():
            found = self._find_or_claim(name, size)
            if isinstance(found, HeldChunk):
                counters.add(cache_hits=1)
                return found
            claim = found
        if claim is None:  # the cache is of no use at this moment
            counters.add(cache_bypasses=1)
            return HeldChunk(data=fetch())
        with claim:
            data = fetch()
            assert len(data) == size, f"fetched {len(data)} bytes of {size}"
            counters.add(cache_misses=1)
            with self._unless_it_cannot():
                if (descriptor := claim.write(data)) is not None:
                    return HeldChunk(descriptor=descriptor, data=data)
                self._warn(f"no room for {size} bytes under its bound of {self.max_bytes}, or on the disk")
        counters.add(cache_bypasses=1)
        return HeldChunk(data=data)

    def discard(self, key: str) -> None:
        """Forget a file, as when its bytes turned out to be damaged."""
        counters.add(cache_damaged=1)
        with self._unless_it_cannot():
            self._discard(self._files.path(_name(key)))

    def _discard(self, path: str) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            with locked(descriptor, seconds=1.0) as ours:
                if ours and is_at(descriptor, path):
                    self._files.release(path, descriptor)
        finally:
            os.close(descriptor)

    def _find_or_claim(self, name: str, size: int) -> HeldChunk | _Claim | None:
        """The chunk's file, or the right to write it; None if another had that right for too long."""
        deadline = time.monotonic() + _WAIT_SECONDS
        pause, longest = _POLL_SECONDS
        while time.monotonic() < deadline:
            if (held := self._find(name, size)) is not None:
                return held
            if (claim := self._claim(name)) is not None:
                return claim
            time.sleep(pause)
            counters.add(wait_seconds=pause)
            pause = min(1.5 * pause, longest)
        self._warn("another process has been fetching a chunk, or holding one, for too long")
        return None

    def _find(self, name: str, size: int) -> HeldChunk | None:
        path = self._files.path(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == size:
            held = HeldChunk(descriptor=descriptor)
            held._touch()
            return held
        os.close(descriptor)
        self._discard(path)  # cut off by a crash, or an eviction under way
        return None

    def _claim(self, name: str) -> _Claim | None:
        """The right to write the file; None if another has it, or the file came into being."""
        path = self._files.partial_path(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # somebody removed the folder
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return None
        claim = _Claim(self._files, name, descriptor)
        if not claim.holds_lock():
            claim.close()
            return None
        if not is_at(descriptor, path):  # it was finished or given up between our opening and our lock
            claim.close()
            return None
        if os.fstat(descriptor).st_size or os.path.exists(self._files.path(name)):
            claim.give_up()  # a dead writer left bytes here, or a living one was quicker
            return None
        return claim

    @contextlib.contextmanager
    def _unless_it_cannot(self):  # type: ignore[no-untyped-def]
        """The disk's refusals are no reason to end a run: they are said once, and the cache is gone round."""
        try:
            yield
        except CacheBusyError:
            self._warn("its account is locked by a process that does not move on")
        except OSError as error:
            self._warn(error.strerror or str(error))

    def _warn(self, problem: str) -> None:
        if problem not in self._warned:
            self._warned.add(problem)
            _LOGGER.warning(
                "chunk cache %s: %s; such chunks are kept in memory, and may be fetched again",
                self._files.root,
                problem,
            )


class _Claim:
    """The right to write one file: its partial one, open and locked. Left as a context, it is given up."""

    def __init__(self, files: CacheFiles, name: str, descriptor: int) -> None:
        self._files, self._name, self._descriptor = files, name, descriptor

    def holds_lock(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def write(self, data: bytes) -> int | None:
        """The descriptor of the whole file, in its place; None if there is no room. Raises OSError."""
        if not self._files.reserve(self._descriptor, len(data)):
            return None
        view, offset = memoryview(data), 0
        while offset < len(data):
            offset += os.pwrite(self._descriptor, view[offset:], offset)
        path = self._files.path(self._name)
        try:
            os.rename(self._files.partial_path(self._name), path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.rename(self._files.partial_path(self._name), path)
        descriptor, self._descriptor = self._descriptor, -1
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return descriptor

    def give_up(self) -> None:
        """Remove what is there, so that others may try."""
        path = self._files.partial_path(self._name)
        # What cannot be removed now is collected by whoever needs its room.
        with contextlib.suppress(OSError, CacheBusyError):
            if os.fstat(self._descriptor).st_size:
                self._files.release(path, self._descriptor)
            elif is_at(self._descriptor, path):
                os.unlink(path)
        self.close()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        # Unlocked, and not left to closing: a process forked meanwhile holds the descriptor too.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

    def __enter__(self) -> _Claim:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor >= 0:
            self.give_up()


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()  # any key makes a valid name of fixed length
