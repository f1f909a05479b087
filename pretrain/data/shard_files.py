"""Local shards as files that are held open, and whether one is still what it was. Called by reader.py."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.data.bounded import Bounded
from pretrain.errors import DataError, StorageError
from pretrain.storage import Storage

Version = tuple[int, int]  # bytes, and nanoseconds of the last change


class ShardFiles:
    """The shards of one local dataset, `most_open` of them open at a time."""

    def __init__(self, storage: Storage, *, most_open: int) -> None:
        self._storage = storage
        self._open = Bounded(most_open, weigh=lambda descriptor: 1, discard=os.close)

    def version(self, shard: str) -> Version | None:
        """Of the file that has the shard's name now; None if there is none."""
        try:
            return _version_of(os.stat(self._path(shard)))
        except OSError:
            return None  # reading will say it

    def read(self, shard: str, offset: int, length: int) -> tuple[bytes, Version]:
        """Bytes of the file that is held open, and its version after they were read.

        Raises StorageError when it cannot be read, DataError when it is shorter than that.
        """
        try:
            descriptor = self._open.get_or_make(
                shard, lambda: os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            )
            data = os.pread(descriptor, length, offset)
            version = _version_of(os.fstat(descriptor))
        except OSError as error:
            raise StorageError(
                f"{self._storage.url}: {shard}: {error.strerror or error}; it was readable before: check the disk"
            ) from error
        if len(data) != length:
            raise DataError(
                f"{self._storage.url}: {shard} got shorter while it was read; shards must not change during a run"
            )
        return data, version

    def let_go(self, shard: str) -> None:
        """Open it anew when it is read next."""
        if shard in self._open:
            self._open.drop(shard)

    def close(self) -> None:
        for shard in list(self._open):
            self._open.drop(shard)

    def _path(self, shard: str) -> Path:
        path = self._storage.local_path(shard)
        assert path is not None, f"{self._storage.url} is local, but its shards have no path"
        return path


def _version_of(status: os.stat_result) -> Version:
    return status.st_size, status.st_mtime_ns
