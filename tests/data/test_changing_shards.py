"""Shards and cached chunks whose bytes change after they were checked: no sample of other bytes is ever given."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import jpeg, write_dataset

from pretrain.data.augment import EvalTransform, TrainTransform
from pretrain.data.index import DatasetIndex
from pretrain.data.loader import TrainLoader
from pretrain.data.order import Order
from pretrain.data.prepare import Arrays, Preparer, Wanted
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream
from pretrain.data.tasks import AS_STORED
from pretrain.errors import DataError
from pretrain.storage import open_storage


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    return write_dataset(tmp_path / "d", count=40, per_shard=20, chunk_samples=5)


def other_image(shard: Path, reader: ChunkReader, chunk: int, row: int) -> bytes:
    """The shard's bytes with another image, that decodes as well, in the place of one."""
    sample = reader.read(chunk, row)
    data = shard.read_bytes()
    image = jpeg(999)[: len(sample.image)].ljust(len(sample.image), b"\0")
    assert image != bytes(sample.image)
    return data[: sample.offset] + image + data[sample.offset + len(image) :]


def shard_of(index: DatasetIndex, number: int) -> Path:
    return Path(index.url) / index.shard_names[number]


def test_a_shard_overwritten_under_a_reader_is_a_data_error_and_never_other_bytes(
    index: DatasetIndex,
) -> None:
    reader = ChunkReader(index)
    shard = shard_of(index, 0)
    changed = other_image(shard, reader, 0, 1)
    shard.write_bytes(changed)  # in place: who has it open sees the new bytes
    with pytest.raises(DataError, match=r"crc32 .* the index says .* run `pretrain data verify") as caught:
        reader.read(0, 1)
    assert shard.name in str(caught.value)
    assert caught.value.exit_code == 3
    reader.read(4, 0)  # of the other shard


def test_a_shard_replaced_by_another_file_is_a_data_error_once_it_is_opened_again(
    index: DatasetIndex,
) -> None:
    reader = ChunkReader(index)
    shard = shard_of(index, 0)
    before = bytes(reader.read(0, 1).image)
    new = shard.with_name("new")
    new.write_bytes(other_image(shard, reader, 0, 1))
    os.replace(new, shard)
    assert bytes(reader.read(0, 1).image) == before  # the file that it holds open is the old one
    reader.store._shards.let_go(shard.name)  # as when many shards are read
    with pytest.raises(DataError, match="crc32"):
        reader.read(0, 1)


@pytest.mark.parametrize("how", ["in place", "by another file", "touched"])
def test_a_shard_rewritten_with_the_same_bytes_is_read_on_and_checked_only_once_more(
    index: DatasetIndex, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ChunkReader(index)
    wanted = [bytes(reader.read(chunk, row).image) for chunk in range(4) for row in range(5)]
    shard = shard_of(index, 0)
    if how == "in place":
        shard.write_bytes(shard.read_bytes())
    elif how == "by another file":
        new = shard.with_name("new")
        new.write_bytes(shard.read_bytes())
        os.replace(new, shard)
        reader.store._tables.drop(0)  # checked anew, of the new file, while the old one is open
    os.utime(shard, ns=(10**18, 10**18))
    fetched = []
    fetch = reader.store._fetch
    monkeypatch.setattr(reader.store, "_fetch", lambda chunk: fetched.append(chunk.number) or fetch(chunk))
    for _ in range(3):
        assert [bytes(reader.read(chunk, row).image) for chunk in range(4) for row in range(5)] == wanted
    assert len(fetched) <= 8, "each chunk once, or twice where the old file was still open"


def prepared(reader: ChunkReader, chunk: int, row: int) -> str:
    """What the loader says of a sample: empty if it decodes."""
    preparer = Preparer(stores=[reader.store], transform=EvalTransform(image_size=16), seed=0)
    out = Arrays(*(np.zeros((1, *shape), dtype) for shape, dtype in Arrays.layout(preparer.transform)))
    wanted = Wanted(0, 0, reader.chunk(chunk), row, AS_STORED)

    class NoPulse:
        def reading(self, item: int) -> None: ...

        def decoding(self, item: int, name: str) -> None: ...

    return preparer.prepare_one(wanted, out, 0, pulse=NoPulse()).error


def test_a_sample_is_called_undecodable_only_of_bytes_that_match_the_index(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.reader._BELIEVED_SECONDS", 0.0)
    reader = ChunkReader(index)
    assert prepared(reader, 0, 1) == ""
    shard = shard_of(index, 0)
    sample, status = reader.read(0, 1), os.stat(shard)
    data = bytearray(shard.read_bytes())
    data[sample.offset : sample.offset + len(sample.image)] = bytes(len(sample.image))
    shard.write_bytes(data)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as when a disk errs: nothing tells
    with pytest.raises(DataError, match="crc32"):  # and not: replaced by another sample
        prepared(reader, 0, 1)


def test_a_cached_chunk_that_its_disk_damaged_after_the_check_is_fetched_again(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.reader._BELIEVED_SECONDS", 0.0)
    local = write_dataset(tmp_path / "d", count=10, chunk_samples=5)
    store = open_storage(f"{s3_bucket}/d")
    for path in sorted((tmp_path / "d").iterdir()):
        store.put(path.name, path)
    reader = ChunkReader(
        local.__class__(**{**vars(local), "url": f"{s3_bucket}/d"}), cache_dir=tmp_path / "cache"
    )
    assert [prepared(reader, 0, row) for row in range(5)] == [""] * 5
    files = [p for p in (tmp_path / "cache" / "chunks").glob("[0-9a-f][0-9a-f]/*") if p.is_file()]
    assert len(files) == 1
    files[0].write_bytes(bytes(files[0].stat().st_size))
    assert [prepared(reader, 0, row) for row in range(5)] == [""] * 5
    local_reader = ChunkReader(local)
    assert [bytes(reader.read(0, row).image) for row in range(5)] == [
        bytes(local_reader.read(0, row).image) for row in range(5)
    ]


def test_an_image_that_was_bad_when_it_was_indexed_is_undecodable(tmp_path: Path) -> None:
    bad = write_dataset(tmp_path / "d", count=5, image=lambda i: b"not an image" if i == 2 else jpeg(i))
    reader = ChunkReader(bad)
    assert [bool(prepared(reader, 0, row)) for row in range(4)] == [False, False, True, False]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("how", ["gone", "cut short", "other bytes"])
def test_what_a_store_does_not_give_ends_the_run_and_is_never_replaced(
    index: DatasetIndex, how: str, workers: int
) -> None:
    shard = shard_of(index, 1)
    data = shard.read_bytes()
    if how == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data[:3000] if how == "cut short" else data[::-1])
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(Order(chunk_samples=index.chunk_samples, seed=1, lanes=2)),
        transform=TrainTransform(image_size=8),
        seed=1,
        global_batch_size=40,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=workers,
    )
    with pytest.raises(DataError, match=shard.name) as caught:
        next(loader.steps(0))
    assert caught.value.exit_code == 3
    assert loader.replaced() == []
    loader.close()
