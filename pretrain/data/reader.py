"""Get a sample's bytes from its chunk. Called by loader.py, in the trainer and in its workers.

A process that opens a chunk for the first time reads all of it, holds its length, checksum and number of
samples against the index, and notes where the images are. After that it reads images one by one: from the
shard itself where that is a local file, else from the chunk's file in the node's cache, else from memory.
A local shard that is another since then, by size or time, is held against the index again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.bounded import Bounded
from pretrain.data.frame_table import FrameTable, frame_table
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import DatasetIndex
from pretrain.data.prefetch import Job, Prefetcher
from pretrain.data.shard_files import ShardFiles, Version
from pretrain.errors import DataError, ObjectChangedError, PretrainError
from pretrain.storage import (
    ChunkCache,
    HeldChunk,
    S3Settings,
    default_cache_bytes,
    is_remote,
    join_url,
    open_storage,
)

# A worker of the only rank visits all lanes: 256 lanes · 5 chunks of 1024 samples, at about 50 bytes each.
MAX_FRAMED_SAMPLES = 2_000_000
_CHANGED_WAIT_SECONDS = 1.0  # for a store that is being started again
MAX_OPEN_FILES = 2048  # and a quarter of what the system allows this process at most
DEFAULT_MEMORY_BYTES = 512 << 20  # of remote chunks a process keeps when no cache folder holds them
DEFAULT_PREFETCH_BYTES = 64 << 20  # a process: eight chunks of the usual size
CACHE_FOLDER = "chunks"  # below data.cache_dir, which holds other things too
_BELIEVED_SECONDS = 60.0  # so that data full of bad images does not have its chunks checked for each
_EVICTED_TIMES = 3  # in a row, between fetching a chunk and reading it; then it is kept in memory


class ChunkRef(NamedTuple):
    """All that a process must know to read one chunk: workers get these and need no index."""

    number: int
    shard: str
    offset: int  # bytes from the shard's start
    num_bytes: int
    num_samples: int
    crc32: int
    shard_sha256: bytes


class _Framed(NamedTuple):
    """A chunk that was held against the index."""

    table: FrameTable
    version: Version | None  # of the local shard then
    checked: float  # when, by the monotonic clock


class RawSample(NamedTuple):
    """One sample as it is stored."""

    key: str
    shard: str
    offset: int  # of the image, bytes from the shard's start
    suffix: str
    image: bytes | memoryview
    label: int  # -1: none
    name: str  # shard, key and offset, for messages


class ChunkStore:
    """Reads samples of one dataset by `ChunkRef`. Pickles as its settings; caches are each process's own.

    cache_dir: for remote datasets, shared by a node's processes; cache_bytes: the most it may hold, None for
    a part of the disk (`default_cache_bytes`). memory_bytes: how much of remote chunks a process keeps where
    no cache holds them. prefetch_bytes: what may be fetched, or waiting to be, ahead of its use. labels:
    False leaves the tars' own unread, for an index that has others. One thread reads; prefetching has
    threads of its own.
    """

    def __init__(
        self,
        *,
        url: str,
        cache_dir: Path | None,
        s3: S3Settings,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        cache_bytes: int | None = None,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        labels: bool = True,
    ) -> None:
        self._settings: dict[str, Any] = {
            "url": url,
            "cache_dir": cache_dir,
            "s3": s3,
            "memory_bytes": memory_bytes,
            "cache_bytes": cache_bytes,
            "prefetch_bytes": prefetch_bytes,
            "labels": labels,
        }
        self._url, self._labels = url, labels
        # The index came from there: a store that does not answer now is away, and is waited for.
        self._storage = open_storage(url, s3=dataclasses.replace(s3, known_to_answer=True))
        self._remote = is_remote(url)
        self._cache_dir = cache_dir if self._remote else None
        self._cache_bytes = cache_bytes
        self._cache: ChunkCache | None = None  # made when first needed: making it touches the disk
        self._prefetcher = self._make_prefetcher()

        def nothing(value: object) -> None:
            """Memory needs no closing."""

        self._tables = Bounded(MAX_FRAMED_SAMPLES, weigh=lambda framed: len(framed.table), discard=nothing)
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most_open = min(MAX_OPEN_FILES, max(16, allowed // 4))
        self._shards = ShardFiles(self._storage, most_open=most_open)
        self._files = Bounded(most_open, weigh=lambda held: 1, discard=HeldChunk.close)
        self._memory = Bounded(memory_bytes, weigh=lambda held: len(held.fresh), discard=HeldChunk.close)

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    def _make_prefetcher(self) -> Prefetcher[ChunkRef, HeldChunk]:
        max_bytes: int = self._settings["prefetch_bytes"]
        return Prefetcher(self._obtain, keep=_must_be_kept, max_bytes=max_bytes)

    def prepare(self) -> None:
        """Look at the cache folder before the first chunk is needed. Raises UsageError if it cannot be one."""
        if self._cache_dir is not None:
            self._open_cache()

    def cached_bytes(self) -> int:
        """What the node's cache holds now, of all datasets; 0 where there is none. Costs one small read."""
        return 0 if self._cache_dir is None else self._open_cache().used_bytes()

    def prefetch(self, chunks: Sequence[ChunkRef]) -> None:
        """Fetch chunks that are needed soon, most urgent first: those of the work at hand, then later ones.

        Returns at once, raises nothing. Goes on as the byte budget has room, until the next call, which
        replaces what has not begun.
        """
        if not self._remote:
            return  # the system reads ahead
        with contextlib.suppress(PretrainError):  # reading will say it
            self._prefetcher.ask(
                Job(chunk.number, chunk.num_bytes, chunk)
                for chunk in chunks
                if self._prefetcher.knows(chunk.number) or not self._at_hand(chunk)
            )

    def read(self, chunk: ChunkRef, row: int) -> RawSample:
        """The sample in that row of the chunk.

        Raises:
            DataError: the chunk's bytes differ from what the index says of them (remote: also when
                fetched again), or the shard is gone. StorageError: the store gives nothing.
        """
        framed: _Framed = self._tables.get_or_make(chunk.number, lambda: self._open(chunk))
        table = framed.table
        offset, length = int(table.offsets[row]), int(table.lengths[row])
        key, suffix = table.key(row), IMAGE_SUFFIXES[table.suffixes[row]]
        return RawSample(
            key=key,
            shard=chunk.shard,
            offset=chunk.offset + offset,
            suffix=suffix,
            image=self._image(chunk, framed.version, offset, length),
            label=int(table.labels[row]),
            name=f"{join_url(self._url, chunk.shard)}: {key}.{suffix} at byte {chunk.offset + offset}",
        )

    def read_again(self, chunk: ChunkRef, row: int) -> RawSample:
        """As `read`, of bytes that were held against the index in the last minute: what looks damaged may have
        become so on a disk since.
        """
        framed: _Framed | None = self._tables.get(chunk.number)
        if framed is not None and time.monotonic() - framed.checked >= _BELIEVED_SECONDS:
            self._tables.drop(chunk.number)
        return self.read(chunk, row)

    def close(self) -> None:
        """Close files, stop prefetching. The store can be used again."""
        self._prefetcher.close()
        self._prefetcher = self._make_prefetcher()
        self._shards.close()
        for held in (self._files, self._memory):
            for key in list(held):
                held.drop(key)

    def _open(self, chunk: ChunkRef) -> _Framed:
        # Before the bytes are read: a change from now on is noticed.
        version = None if self._remote else self._shards.version(chunk.shard)
        return self._frame(chunk, self._checked(chunk), version)

    def _frame(self, chunk: ChunkRef, data: bytes | memoryview, version: Version | None) -> _Framed:
        where = self._where(chunk)
        table = frame_table(data, where=where, labels=self._labels)
        if len(table) != chunk.num_samples:
            raise DataError(
                f"{where}: {len(table)} samples, the index says {chunk.num_samples}; {self._verify_hint()}"
            )
        return _Framed(table, version, time.monotonic())

    def _image(
        self, chunk: ChunkRef, version: Version | None, offset: int, length: int
    ) -> bytes | memoryview:
        if self._remote:
            return self._read_held(chunk, offset, length)
        data, now = self._shards.read(chunk.shard, chunk.offset + offset, length)
        if now == version:
            return data
        # Another file, or other bytes in it, since the chunk was checked. If they are the same bytes, go on.
        self._shards.let_go(chunk.shard)
        self._tables.drop(chunk.number)
        version = self._shards.version(chunk.shard)
        whole = self._fetch(chunk)
        self._tables.get_or_make(chunk.number, lambda: self._frame(chunk, whole, version))
        return whole[offset : offset + length]

    def _checked(self, chunk: ChunkRef) -> bytes | memoryview:
        """The chunk's bytes, which match the index."""
        if not self._remote:
            return self._fetch(chunk)
        for _ in range(2):
            held = self._held(chunk)
            if held.fresh is not None:  # checked as it was fetched
                data = held.fresh
                held.forget_fresh()
                return data
            whole = self._read_held(chunk, 0, chunk.num_bytes)
            if _matches(whole, chunk):
                return whole
            # It did when it was written: the file was cut off by a crash, or the disk errs.
            self._let_go(chunk)
            self._open_cache().discard(self._cache_key(chunk))
        raise DataError(
            f"{self._cache_dir}: cached chunks come back different from what was written; "
            "check the disk, or choose another data.cache_dir"
        )

    def _read_held(self, chunk: ChunkRef, offset: int, length: int) -> bytes | memoryview:
        """Bytes of a remote chunk, fetched again if it has been evicted."""
        for _ in range(_EVICTED_TIMES):
            held = self._held(chunk)
            held.forget_fresh()  # fetched again after an eviction: nobody will want the whole
            data = held.read(offset, length)
            if data is not None:
                return data
            self._let_go(chunk)
        # So small a cache that it loses a chunk before it can be read.
        held = self._memory.get_or_make(chunk.number, lambda: HeldChunk(data=self._fetch(chunk)))
        return memoryview(held.fresh)[offset : offset + length]

    def _held(self, chunk: ChunkRef) -> HeldChunk:
        """A remote chunk, in whichever way this process has it or gets it."""
        for place in (self._files, self._memory):
            if chunk.number in place:
                held: HeldChunk = place.get_or_make(chunk.number, lambda: None)
                return held
        obtained = self._prefetcher.take(chunk.number) or self._obtain(chunk)
        place = self._memory if obtained.in_memory else self._files
        place.get_or_make(chunk.number, lambda: obtained)
        return obtained

    def _let_go(self, chunk: ChunkRef) -> None:
        for place in (self._files, self._memory):
            if chunk.number in place:
                place.drop(chunk.number)

    def _at_hand(self, chunk: ChunkRef) -> bool:
        """Whether there is nothing to prefetch."""
        if chunk.number in self._files or chunk.number in self._memory:
            return True
        return self._cache_dir is not None and self._open_cache().holds(self._cache_key(chunk))

    def _obtain(self, chunk: ChunkRef) -> HeldChunk:
        """A chunk from the cache, or from the store into the cache. Called in the prefetcher's threads too."""
        if self._cache_dir is None:
            return HeldChunk(data=self._fetch(chunk))
        return self._open_cache().get(self._cache_key(chunk), chunk.num_bytes, lambda: self._fetch(chunk))

    def _open_cache(self) -> ChunkCache:
        assert self._cache_dir is not None, "no cache folder"
        if self._cache is None:
            size = self._cache_bytes
            self._cache = ChunkCache(
                self._cache_dir / CACHE_FOLDER,
                max_bytes=default_cache_bytes(self._cache_dir / CACHE_FOLDER) if size is None else size,
            )
        return self._cache

    def _cache_key(self, chunk: ChunkRef) -> str:
        # By content: what a redaction or an extension leaves as it was is not fetched again.
        return f"{chunk.shard_sha256.hex()}/{chunk.offset}+{chunk.num_bytes}"

    def _fetch(self, chunk: ChunkRef) -> bytes:
        """The chunk's bytes from the store, checked. A remote one that differs is asked for again: a proxy
        may have held something stale, or a line may have flipped a bit. So is one that the store says has changed,
        as a radosgw that was killed and started again has said of one that had not: the checksum is the judge.
        """
        for is_last in (False, False, True) if self._remote else (True,):
            try:
                data = self._storage.read(chunk.shard, chunk.offset, chunk.num_bytes)
            except ObjectChangedError:
                if is_last:
                    raise
                time.sleep(_CHANGED_WAIT_SECONDS)
                continue
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
        cache_bytes: int | None = None,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
    ) -> None:
        self.index, self.s3, self.cache_dir = index, s3, cache_dir
        self.store = ChunkStore(
            url=index.url,
            cache_dir=cache_dir,
            s3=s3,
            memory_bytes=memory_bytes,
            cache_bytes=cache_bytes,
            prefetch_bytes=prefetch_bytes,
            labels=not index.labels_overridden,
        )

    def chunk(self, number: int) -> ChunkRef:
        index = self.index
        shard = int(index.chunk_shard[number])
        return ChunkRef(
            number=number,
            shard=index.shard_names[shard],
            offset=int(index.chunk_offset[number]),
            num_bytes=int(index.chunk_bytes[number]),
            num_samples=int(index.chunk_samples[number]),
            crc32=int(index.chunk_crc32[number]),
            shard_sha256=index.shard_sha256[shard].tobytes(),
        )

    def read(self, chunk: int, row: int) -> RawSample:
        """The sample in row `row` of chunk number `chunk`."""
        return self.store.read(self.chunk(chunk), row)

    def close(self) -> None:
        self.store.close()


def _must_be_kept(held: HeldChunk) -> bool:
    """Chunks in memory are; those in a file of the cache are closed, and found there."""
    if not held.in_memory:
        held.close()
    return held.in_memory


def _matches(data: bytes | memoryview, chunk: ChunkRef) -> bool:
    return len(data) == chunk.num_bytes and zlib.crc32(data) == chunk.crc32
