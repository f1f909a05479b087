"""Get a sample's bytes from its chunk. Called by loader.py, in the trainer and in its workers.

A process that opens a chunk for the first time reads all of it, holds its length, checksum and number of
samples against the index, and notes where the images are. After that it reads images one by one: from the
shard itself where that is a local file, else from the chunk's file in the cache folder, else from memory.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.frame_table import FrameTable, frame_table
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import DatasetIndex
from pretrain.errors import DataError, StorageError
from pretrain.storage import FileCache, S3Settings, is_remote, join_url, open_storage

# A worker of the only rank visits all lanes: 256 lanes · 5 chunks of 1024 samples, at about 50 bytes each.
MAX_FRAMED_SAMPLES = 2_000_000
MAX_OPEN_FILES = 128
DEFAULT_MEMORY_BYTES = (
    512 << 20
)  # of chunks a process keeps when they are remote and there is no cache folder


class ChunkRef(NamedTuple):
    """All that a process must know to read one chunk: workers get these and need no index."""

    number: int
    shard: str
    offset: int  # bytes from the shard's start
    num_bytes: int
    num_samples: int
    crc32: int


class RawSample(NamedTuple):
    """One sample as it is stored."""

    key: str
    shard: str
    offset: int  # of the image, bytes from the shard's start
    suffix: str
    image: bytes | memoryview
    label: int  # -1: none
    name: str  # shard, key and offset, for messages


class _Bounded(OrderedDict[Any, Any]):
    """The most recently used values, up to a total weight (the newest stays whatever it weighs)."""

    def __init__(self, capacity: int, *, weigh: Callable[[Any], int], discard: Callable[[Any], None]) -> None:
        super().__init__()
        self.capacity, self.total = capacity, 0
        self._weigh, self._discard = weigh, discard

    def get_or_make(self, key: Any, make: Callable[[], Any]) -> Any:
        if key in self:
            self.move_to_end(key)
            return self[key]
        value = make()
        self.total += self._weigh(value)
        while self and self.total > self.capacity:
            self.drop(next(iter(self)))
        self[key] = value
        return value

    def drop(self, key: Any) -> None:
        value = self.pop(key)
        self.total -= self._weigh(value)
        self._discard(value)


class ChunkStore:
    """Reads samples of one dataset by `ChunkRef`. Pickles as its settings; caches are each process's own.

    identity: the dataset's, which names its chunks in the cache folder. cache_dir: for remote datasets,
    shared by a node's processes; memory_bytes: how much of them a process keeps where there is none.
    """

    def __init__(
        self,
        *,
        url: str,
        identity: str,
        cache_dir: Path | None,
        s3: S3Settings,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self._settings = {
            "url": url,
            "identity": identity,
            "cache_dir": cache_dir,
            "s3": s3,
            "memory_bytes": memory_bytes,
        }
        self._url, self._identity = url, identity
        self._storage = open_storage(url, s3=s3)
        self._remote = is_remote(url)
        self._cache_dir = cache_dir if self._remote else None
        self._cache: FileCache | None = None  # made when first needed: making it touches the disk

        def nothing(value: object) -> None:
            """Memory needs no closing."""

        self._tables = _Bounded(MAX_FRAMED_SAMPLES, weigh=len, discard=nothing)
        self._memory = _Bounded(memory_bytes, weigh=len, discard=nothing)
        self._files = _Bounded(MAX_OPEN_FILES, weigh=lambda descriptor: 1, discard=os.close)

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    def read(self, chunk: ChunkRef, row: int) -> RawSample:
        """The sample in that row of the chunk.

        Raises:
            DataError: the chunk's bytes differ from what the index says of them (remote: also when
                fetched again), or the shard is gone. StorageError: the store gives nothing.
        """
        table: FrameTable = self._tables.get_or_make(chunk.number, lambda: self._open(chunk))
        offset, length = int(table.offsets[row]), int(table.lengths[row])
        key, suffix = table.key(row), IMAGE_SUFFIXES[table.suffixes[row]]
        return RawSample(
            key=key,
            shard=chunk.shard,
            offset=chunk.offset + offset,
            suffix=suffix,
            image=self._image(chunk, offset, length),
            label=int(table.labels[row]),
            name=f"{join_url(self._url, chunk.shard)}: {key}.{suffix} at byte {chunk.offset + offset}",
        )

    def close(self) -> None:
        """Close files. The store can be used again."""
        for key in list(self._files):
            self._files.drop(key)

    def _open(self, chunk: ChunkRef) -> FrameTable:
        where = self._where(chunk)
        table = frame_table(self._checked(chunk), where=where)
        if len(table) != chunk.num_samples:
            raise DataError(
                f"{where}: {len(table)} samples, the index says {chunk.num_samples}; {self._verify_hint()}"
            )
        return table

    def _image(self, chunk: ChunkRef, offset: int, length: int) -> bytes | memoryview:
        if not self._remote:
            path = self._storage.local_path(chunk.shard)
            assert path is not None, f"{self._url} is local, but its shards have no path"
            return self._pread(chunk.shard, lambda: path, chunk.offset + offset, length)
        if self._cache_dir is not None:
            return self._pread(chunk.number, lambda: self._cached(chunk), offset, length)
        return memoryview(self._in_memory(chunk))[offset : offset + length]

    def _pread(self, file: Any, path: Callable[[], Path], offset: int, length: int) -> bytes:
        """Bytes of a file that was checked before, held open under the name `file`."""
        try:
            descriptor = self._files.get_or_make(file, lambda: os.open(path(), os.O_RDONLY | os.O_CLOEXEC))
            data = os.pread(descriptor, length, offset)
        except OSError as error:
            raise StorageError(
                f"{self._url}: {file}: {error.strerror or error}; it was readable before: check the disk"
            ) from error
        if len(data) != length:
            raise DataError(
                f"{self._url}: {file} got shorter while it was read; shards must not change during a run"
            )
        return data

    def _checked(self, chunk: ChunkRef) -> bytes:
        """The chunk's bytes, which match the index."""
        if not self._remote:
            return self._fetch(chunk)
        if self._cache_dir is None:
            return self._in_memory(chunk)
        for _ in range(2):
            data = self._cached(chunk).read_bytes()
            if _matches(data, chunk):
                return data
            # It did when it was written: the file was cut off by a crash, or the disk errs.
            self._open_cache().discard(self._cache_key(chunk))
        raise DataError(
            f"{self._cache_dir}: cached chunks come back different from what was written; "
            "check the disk, or choose another data.cache_dir"
        )

    def _in_memory(self, chunk: ChunkRef) -> bytes:
        data: bytes = self._memory.get_or_make(chunk.number, lambda: self._fetch(chunk))
        return data

    def _cached(self, chunk: ChunkRef) -> Path:
        return self._open_cache().get(self._cache_key(chunk), lambda: self._fetch(chunk))

    def _open_cache(self) -> FileCache:
        assert self._cache_dir is not None, "no cache folder"
        if self._cache is None:
            self._cache = FileCache(self._cache_dir)
        return self._cache

    def _cache_key(self, chunk: ChunkRef) -> str:
        return f"{self._identity}/{chunk.number}"

    def _fetch(self, chunk: ChunkRef) -> bytes:
        """The chunk's bytes from the store, checked. A remote one that differs is asked for once more:
        a proxy may have held something stale, or a line may have flipped a bit.
        """
        for _ in range(2 if self._remote else 1):
            data = self._storage.read(chunk.shard, chunk.offset, chunk.num_bytes)
            if _matches(data, chunk):
                return data
        raise DataError(
            f"{self._where(chunk)}: crc32 {zlib.crc32(data):08x}, the index says {chunk.crc32:08x}; "
            f"{self._verify_hint()}"
        )

    def _where(self, chunk: ChunkRef) -> str:
        return f"{join_url(self._url, chunk.shard)} bytes {chunk.offset}+{chunk.num_bytes}"

    def _verify_hint(self) -> str:
        return f"the shard was changed or damaged: run `pretrain data verify {self._url}`"


class ChunkReader:
    """A dataset's index together with the store of its chunks.

    Raises nothing at construction; what `read` raises, see `ChunkStore.read`.
    """

    def __init__(
        self,
        index: DatasetIndex,
        *,
        cache_dir: Path | None = None,
        s3: S3Settings = S3Settings(),  # noqa: B008 - frozen
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self.index = index
        self.store = ChunkStore(
            url=index.url, identity=index.identity, cache_dir=cache_dir, s3=s3, memory_bytes=memory_bytes
        )

    def chunk(self, number: int) -> ChunkRef:
        index = self.index
        return ChunkRef(
            number=number,
            shard=index.shard_names[int(index.chunk_shard[number])],
            offset=int(index.chunk_offset[number]),
            num_bytes=int(index.chunk_bytes[number]),
            num_samples=int(index.chunk_samples[number]),
            crc32=int(index.chunk_crc32[number]),
        )

    def read(self, chunk: int, row: int) -> RawSample:
        """The sample in row `row` of chunk number `chunk`."""
        return self.store.read(self.chunk(chunk), row)

    def close(self) -> None:
        self.store.close()


def _matches(data: bytes, chunk: ChunkRef) -> bool:
    return len(data) == chunk.num_bytes and zlib.crc32(data) == chunk.crc32
