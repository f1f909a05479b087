"""Files fetched once and shared by a node's processes. Used by data/reader.py for chunks from a bucket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.errors import StorageError

_PARTIAL = ".partial"


class FileCache:
    """A folder of files named by their keys, safe for many threads and processes of one machine.

    A file is written under a partial name, which its writer keeps locked, and renamed when it is whole.
    Other callers of the same key wait for the lock, so one fetch serves all. The system drops a dead
    writer's lock: what is partial and not locked is junk, and is removed when a cache is opened.
    Nothing is synced to disk: contents can be fetched again, and readers check them.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root)
        with self._typed_errors():
            self._root.mkdir(parents=True, exist_ok=True)
            for partial in self._root.glob(f"*/*{_PARTIAL}"):
                self._remove_if_abandoned(partial)

    @property
    def root(self) -> Path:
        return self._root

    def get(self, key: str, fetch: Callable[[], bytes]) -> Path:
        """The file of `key`, made from what `fetch` returns if it is not there yet.

        What `fetch` raises is passed on, and nothing is kept. Raises StorageError if the disk refuses.
        """
        path = self._path(key)
        if path.exists():
            return path
        partial = path.with_name(path.name + _PARTIAL)
        with self._typed_errors():
            path.parent.mkdir(exist_ok=True)
        while True:
            with self._locked(partial) as descriptor:
                if not _is_at(descriptor, partial):
                    if path.exists():
                        return path
                    continue  # another writer failed, or a collector came before our lock
                if path.exists():  # finished between our look and our lock
                    partial.unlink()
                    return path
                try:
                    data = fetch()
                    with self._typed_errors():
                        os.ftruncate(descriptor, 0)  # a dead writer may have left bytes here
                        with os.fdopen(os.dup(descriptor), "wb") as file:
                            file.write(data)
                        os.replace(partial, path)
                except BaseException:
                    partial.unlink(missing_ok=True)
                    raise
                return path

    def discard(self, key: str) -> None:
        """Forget a file, as when its bytes turned out to be damaged."""
        with self._typed_errors():
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()  # any key makes a valid name of fixed length
        return self._root / digest[:2] / digest[2:]

    @contextlib.contextmanager
    def _locked(self, partial: Path) -> Iterator[int]:
        with self._typed_errors():
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with self._typed_errors():
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
            # Unlocked, and not only closed: a worker forked meanwhile holds the descriptor too.
        finally:
            with contextlib.closing(os.fdopen(descriptor)):
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    @staticmethod
    def _remove_if_abandoned(partial: Path) -> None:
        try:
            descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # its writer has just finished
        with contextlib.closing(os.fdopen(descriptor)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # its writer is alive
            if _is_at(descriptor, partial):
                partial.unlink()
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space, or choose another folder" if full else "check the folder"
            raise StorageError(f"cache {self._root}: {error.strerror or error}; {hint}") from None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file still goes by that name."""
    ours = os.fstat(descriptor)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
