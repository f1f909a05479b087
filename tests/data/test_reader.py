from __future__ import annotations

import gc
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from services.fault_proxy import Fault, FaultProxy
from tiny_shards import index_folder, jpeg, write_dataset

from pretrain.data.index import open_index, open_samples
from pretrain.data.order import locate_sample, sample_ends
from pretrain.data.reader import ChunkReader, ChunkStore
from pretrain.errors import DataError, ObjectChangedError, ObjectNotFoundError
from pretrain.storage import S3Settings, counters


def chunk_files(cache_dir: Path) -> list[Path]:
    """The whole chunks in a cache folder."""
    return [path for path in (cache_dir / "chunks").glob("[0-9a-f][0-9a-f]/*") if path.is_file()]


def read_all(reader: ChunkReader, order: np.ndarray | None = None) -> list:
    samples = np.arange(reader.index.num_samples) if order is None else order
    chunks, rows = locate_sample(sample_ends(reader.index.chunk_samples), samples)
    return [reader.read(c, r) for c, r in zip(chunks.tolist(), rows.tolist(), strict=True)]


def test_samples_are_those_that_webdataset_reads_from_the_same_shards(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=47)
    shards = [str(tmp_path / "d" / name) for name in index.shard_names]
    wanted = [
        (s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(shards, shardshuffle=False)
    ]
    got = [(s.key, bytes(s.image), s.label) for s in read_all(ChunkReader(index))]
    assert got == wanted
    table = open_samples(index)
    assert [table.key(i) for i in range(47)] == [key for key, _, _ in wanted]


def test_any_sample_can_be_read_in_any_order_and_says_where_it_lies(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=30)
    reader = ChunkReader(index)
    shuffled = np.random.default_rng(0).permutation(30)
    in_order = read_all(reader)
    assert read_all(pickle.loads(pickle.dumps(reader)), shuffled) == [in_order[i] for i in shuffled]
    for sample in in_order:
        shard = (tmp_path / "d" / sample.shard).read_bytes()
        assert shard[sample.offset : sample.offset + len(sample.image)] == sample.image
        assert sample.name == f"{index.url}/{sample.shard}: {sample.key}.jpg at byte {sample.offset}"


def test_unlabelled_samples_and_upper_case_suffixes_are_read(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=5, labels=False, suffix="JPEG")
    assert [(s.suffix, s.label) for s in read_all(ChunkReader(index))] == [("jpeg", -1)] * 5


def test_a_flipped_byte_is_a_data_error_that_names_the_shard(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=20, chunk_samples=5)
    path = tmp_path / "d" / index.shard_names[0]
    data = bytearray(path.read_bytes())
    data[int(index.chunk_offset[2]) + 700] ^= 1
    path.write_bytes(data)
    reader = ChunkReader(index)
    reader.read(1, 0)
    with pytest.raises(DataError, match=r"crc32 .* the index says .*`pretrain data verify") as caught:
        reader.read(2, 0)
    assert index.shard_names[0] in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_shortened_shard_is_a_data_error(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=20)
    path = tmp_path / "d" / index.shard_names[0]
    os.truncate(path, int(index.chunk_offset[-1]) + 100)
    reader = ChunkReader(index)
    reader.read(0, 0)
    with pytest.raises(DataError, match=index.shard_names[0]):
        reader.read(index.num_chunks - 1, 0)


def test_a_shard_that_shrinks_under_a_reader_is_a_data_error(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=20)
    reader = ChunkReader(index)
    last = reader.read(index.num_chunks - 1, 0)
    os.truncate(tmp_path / "d" / index.shard_names[0], last.offset + 1)
    with pytest.raises(DataError, match="got shorter"):
        reader.read(index.num_chunks - 1, 0)


def test_a_shard_that_is_gone_is_a_data_error(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=20)
    (tmp_path / "d" / index.shard_names[0]).unlink()
    with pytest.raises(ObjectNotFoundError, match=index.shard_names[0]) as caught:
        ChunkReader(index).read(0, 0)
    assert caught.value.exit_code == 3


def test_a_chunk_with_another_number_of_samples_than_indexed_is_a_data_error(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=20, chunk_samples=5)
    reader = ChunkReader(index)
    wrong = reader.chunk(0)._replace(num_samples=6)
    with pytest.raises(DataError, match="5 samples, the index says 6"):
        reader.store.read(wrong, 0)


def test_few_open_files_serve_many_shards(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=300, per_shard=1, image=lambda i: jpeg(0, (2, 2)))
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    try:
        reader = ChunkReader(index)
        before = len(os.listdir("/proc/self/fd"))
        assert len(read_all(reader)) == 300
        assert len(os.listdir("/proc/self/fd")) - before <= 64, "a quarter of what is allowed"
        reader.close()
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))


class TestBucket:
    """The same through a real S3 server."""

    @pytest.fixture
    def bucket_index(self, tmp_path: Path, s3_bucket: str) -> object:
        from pretrain.storage import open_storage

        write_dataset(tmp_path / "d", count=45, chunk_samples=6)
        store = open_storage(f"{s3_bucket}/set")
        for path in sorted((tmp_path / "d").iterdir()):
            store.put(path.name, path.read_bytes())
        return open_index(f"{s3_bucket}/set")

    @pytest.mark.parametrize("cached", [True, False])
    def test_a_bucket_gives_the_samples_that_the_folder_gives(
        self, bucket_index, tmp_path: Path, cached: bool
    ) -> None:
        cache_dir = tmp_path / "cache" if cached else None
        local = read_all(ChunkReader(index_folder(tmp_path / "d", chunk_samples=6)))
        shuffled = np.random.default_rng(0).permutation(45)
        # So small a memory keeps one chunk at a time.
        reader = ChunkReader(bucket_index, cache_dir=cache_dir, memory_bytes=1)
        remote = read_all(reader, shuffled)
        wanted = [local[i] for i in shuffled]
        assert [(s.key, bytes(s.image), s.label, s.offset) for s in remote] == [
            (s.key, bytes(s.image), s.label, s.offset) for s in wanted
        ]

    def test_each_chunk_is_fetched_once_into_the_cache_and_read_from_there(
        self, bucket_index, tmp_path: Path, s3_bucket: str
    ) -> None:
        from pretrain.storage import open_storage

        first = read_all(ChunkReader(bucket_index, cache_dir=tmp_path / "cache"))
        for name in bucket_index.shard_names:
            open_storage(f"{s3_bucket}/set").delete(name)
        again = read_all(ChunkReader(bucket_index, cache_dir=tmp_path / "cache"))
        assert [(s.key, bytes(s.image)) for s in first] == [(s.key, bytes(s.image)) for s in again]

    @pytest.mark.parametrize("damage", ["cut short", "one bit"])
    def test_a_damaged_cache_file_is_fetched_again(self, bucket_index, tmp_path: Path, damage: str) -> None:
        wanted = read_all(ChunkReader(bucket_index, cache_dir=tmp_path / "cache"))
        files = chunk_files(tmp_path / "cache")
        assert len(files) == bucket_index.num_chunks
        for path in files:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data if damage == "one bit" else data[:700])
        again = read_all(ChunkReader(bucket_index, cache_dir=tmp_path / "cache"))
        assert [(s.key, bytes(s.image)) for s in again] == [(s.key, bytes(s.image)) for s in wanted]

    @pytest.mark.parametrize("bound", [1, 6000, 20_000])
    def test_a_cache_smaller_than_what_is_worked_on_is_slow_and_right(
        self, bucket_index, tmp_path: Path, bound: int
    ) -> None:
        wanted = read_all(ChunkReader(bucket_index))
        reader = ChunkReader(bucket_index, cache_dir=tmp_path / "cache", cache_bytes=bound, memory_bytes=1)
        shuffled = np.random.default_rng(0).permutation(45)
        for _ in range(3):
            got = read_all(reader, shuffled)
            assert [(s.key, bytes(s.image)) for s in got] == [
                (wanted[i].key, bytes(wanted[i].image)) for i in shuffled
            ]
            assert sum(path.stat().st_size for path in chunk_files(tmp_path / "cache")) <= bound

    @pytest.mark.parametrize("cached", [True, False])
    def test_prefetched_chunks_are_there_when_they_are_read_and_asked_for_once(
        self, bucket_index, tmp_path: Path, cached: bool
    ) -> None:
        reader = ChunkReader(bucket_index, cache_dir=tmp_path / "cache" if cached else None)
        before = counters.snapshot()
        chunks = [reader.chunk(i) for i in range(bucket_index.num_chunks)]
        reader.store.prefetch(chunks)
        reader.store.prefetch(chunks)
        assert len(read_all(reader)) == 45
        spent = counters.since(before)
        assert spent["requests"] == bucket_index.num_chunks
        assert spent["read_bytes"] == int(bucket_index.chunk_bytes.sum())
        reader.store.prefetch(chunks)
        assert counters.since(before)["requests"] == bucket_index.num_chunks
        assert reader.store.cached_bytes() >= (spent["read_bytes"] if cached else 0)
        reader.close()
        again = ChunkReader(bucket_index)
        for store in (again.store, again.store):  # a closed one can be used again, prefetching included
            before = counters.snapshot()
            store.prefetch(chunks)
            assert len(read_all(again)) == 45
            assert counters.since(before)["requests"] == bucket_index.num_chunks
            again.close()
            again.store._tables.clear()  # else only images would be read

    @pytest.mark.parametrize("cached", [True, False])
    def test_a_prefetch_that_fails_says_nothing_until_the_chunk_is_read(
        self, bucket_index, tmp_path: Path, s3_bucket: str, cached: bool
    ) -> None:
        from pretrain.storage import open_storage

        open_storage(f"{s3_bucket}/set").delete(bucket_index.shard_names[0])
        reader = ChunkReader(bucket_index, cache_dir=tmp_path / "cache" if cached else None)
        reader.store.prefetch([reader.chunk(0), reader.chunk(bucket_index.num_chunks - 1)])
        assert reader.read(bucket_index.num_chunks - 1, 0).key
        with pytest.raises(ObjectNotFoundError, match=bucket_index.shard_names[0]):
            reader.read(0, 0)

    @pytest.mark.parametrize("times", [1, 3])
    def test_a_store_that_says_an_unchanged_object_has_changed_is_asked_again_but_not_for_ever(
        self, bucket_index, s3_server, monkeypatch: pytest.MonkeyPatch, times: int
    ) -> None:
        wanted = read_all(ChunkReader(bucket_index))
        with FaultProxy(s3_server.port) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            reader = ChunkReader(bucket_index)
            # A body that breaks off, and then no more of it under the ETag that its beginning had.
            proxy.faults.extend([Fault(kind="close", after_bytes=1500), Fault(kind="412")] * times)
            if times == 3:
                with pytest.raises(ObjectChangedError, match="was replaced while being read"):
                    read_all(reader)
            else:
                assert [(s.key, bytes(s.image)) for s in read_all(reader)] == [
                    (s.key, bytes(s.image)) for s in wanted
                ]
            assert not proxy.faults
            assert sum("if-match" in head.lower() for head in proxy.requests) == times
            reader.close()

    def test_many_reads_take_no_more_memory_and_no_more_files_than_few(
        self, bucket_index, tmp_path: Path
    ) -> None:
        reader = ChunkReader(bucket_index, cache_dir=tmp_path / "cache", cache_bytes=20_000)
        random = np.random.default_rng(0)

        def many() -> tuple[int, int]:
            for _ in range(40):
                read_all(reader, random.permutation(45))
            gc.collect()
            return psutil.Process().memory_info().rss, psutil.Process().num_fds()

        many()
        first, last = many(), [many() for _ in range(4)][-1]
        assert last[0] - first[0] < 1 << 20
        assert last[1] <= first[1] + 2

    @pytest.mark.parametrize("cached", [True, False])
    def test_an_object_that_differs_from_the_index_is_a_data_error(
        self, bucket_index, tmp_path: Path, s3_bucket: str, cached: bool
    ) -> None:
        from pretrain.storage import open_storage

        store = open_storage(f"{s3_bucket}/set")
        name = bucket_index.shard_names[0]
        data = bytearray(store.read(name))
        data[600] ^= 1
        store.put(name, bytes(data))
        reader = ChunkReader(bucket_index, cache_dir=tmp_path / "cache" if cached else None)
        with pytest.raises(DataError, match="the index says"):
            reader.read(0, 0)


def test_a_pickled_store_is_small_whatever_was_read(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=40)
    reader = ChunkReader(index)
    before = len(pickle.dumps(reader.store))
    read_all(reader)
    assert len(pickle.dumps(reader.store)) == before < 1500
    fresh = ChunkStore(url=index.url, cache_dir=None, s3=S3Settings())
    assert fresh.read(reader.chunk(3), 1) == reader.read(3, 1)
