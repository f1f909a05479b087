"""How often, and for how many bytes, an epoch asks the store: counted by the server, against what is predicted."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services.aws_variables import AWS_VARIABLES
from services.radosgw import Radosgw, missing_binaries
from services.required import skip_or_fail

from pretrain.cli import main
from pretrain.data.index import open_index
from pretrain.data.order import Order, slice_batch
from pretrain.data.reader import ChunkReader, ChunkRef, ChunkStore
from pretrain.storage import S3Settings, counters, open_storage

SAMPLES_A_CHUNK, CHUNKS_A_SHARD, SHARDS = 1024, 64, 32
SAMPLE_BYTES = 1024  # a header and one block
CHUNKS = CHUNKS_A_SHARD * SHARDS
SAMPLES = CHUNKS * SAMPLES_A_CHUNK  # 2,097,152
BATCH, LANES = 1024, 256

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[Radosgw]:
    """A server of its own: two gigabytes of samples go with it when it ends."""
    if missing_binaries():
        skip_or_fail(f"the S3 server is not installed: {', '.join(missing_binaries())}")
    server = Radosgw(store_bytes=5 << 30)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def environment(server: Radosgw, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Radosgw:
    for variable in AWS_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in server.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    (tmp_path / "node").mkdir(mode=0o700)
    monkeypatch.setenv("PRETRAIN_NODE_DIR", str(tmp_path / "node"))
    return server


def shard_bytes(shard: int) -> bytes:
    """Samples of 500 bytes, each with its number for a key and at its beginning; made in one go, as 2 M must be."""
    first, count = shard * CHUNKS_A_SHARD * SAMPLES_A_CHUNK, CHUNKS_A_SHARD * SAMPLES_A_CHUNK
    member = tarfile.TarInfo("s00000000.jpg")
    member.size = 500
    header = np.frombuffer(member.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    rows = np.zeros((count, SAMPLE_BYTES), np.uint8)
    rows[:, :512] = header
    numbers = np.arange(first, first + count)
    digits = (numbers[:, None] // 10 ** np.arange(7, -1, -1) % 10).astype(np.uint8) + ord("0")
    rows[:, 1:9] = digits
    sums = int(header.sum()) - int(header[148:156].sum()) + 8 * ord(" ") - 8 * ord("0")
    sums = sums + (digits.astype(np.int64)).sum(axis=1)
    rows[:, 148:154] = (sums[:, None] // 8 ** np.arange(5, -1, -1) % 8).astype(np.uint8) + ord("0")
    rows[:, 512:520] = numbers.astype("<u8").view(np.uint8).reshape(-1, 8)
    return rows.tobytes()


@pytest.fixture(scope="module")
def refs(server: Radosgw) -> list[ChunkRef]:
    """2,097,152 samples in 2048 chunks of 1 MiB, in the bucket `tiny`."""
    server.make_bucket("tiny")
    client, chunk_bytes, made = server.client(), SAMPLES_A_CHUNK * SAMPLE_BYTES, []
    for shard in range(SHARDS):
        data, name = shard_bytes(shard), f"shard-{shard:03d}.tar"
        digest = hashlib.sha256(data).digest()
        client.put_object(Bucket="tiny", Key=name, Body=data)
        for chunk in range(CHUNKS_A_SHARD):
            own = data[chunk * chunk_bytes : (chunk + 1) * chunk_bytes]
            made.append(
                ChunkRef(
                    number=len(made),
                    shard=name,
                    offset=chunk * chunk_bytes,
                    num_bytes=chunk_bytes,
                    num_samples=SAMPLES_A_CHUNK,
                    crc32=zlib.crc32(own),
                    shard_sha256=digest,
                )
            )
    return made


def tiny_order() -> Order:
    order = Order(chunk_samples=np.full(CHUNKS, SAMPLES_A_CHUNK), seed=5, lanes=LANES)
    assert not order.small
    return order


def tiny_store(refs: list[ChunkRef], **settings: Any) -> ChunkStore:
    return ChunkStore(url="s3://tiny", s3=S3Settings(), **settings)


def read_epoch(
    store: ChunkStore,
    ref: Callable[[int], ChunkRef],
    order: Order,
    *,
    rank: int,
    ranks: int,
    batch: int,
    together: Barrier | None,
    check: Callable[[int, int, Any], bool],
) -> None:
    """What one rank reads of the first epoch, in step with the others as training is."""
    for start in range(0, order.num_samples - order.num_samples % batch, batch):
        own = slice_batch(order.batch(start, batch), rank=rank, world_size=ranks)
        chunks, rows = order.locate(own[own >= 0])
        for chunk, row in zip(chunks.tolist(), rows.tolist(), strict=True):
            if not check(chunk, row, store.read(ref(chunk), row)):
                os._exit(17)
        if together is not None:
            together.wait(timeout=120)


def is_its_number(chunk: int, row: int, sample: Any) -> bool:
    number = chunk * SAMPLES_A_CHUNK + row
    return int.from_bytes(sample.image[:8], "little") == number and sample.key == f"s{number:08d}"


def in_ranks(ranks: int, work: Callable[[int, Barrier], None]) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(ranks)
    children = [context.Process(target=work, args=(rank, together)) for rank in range(ranks)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * ranks


@pytest.mark.parametrize(
    ("ranks", "nodes", "cache_bytes"),
    [(1, 1, 1600 << 20), (4, 1, 1600 << 20), (8, 1, 1600 << 20), (8, 8, 300 << 20)],
)
def test_an_epoch_of_two_million_samples_asks_for_each_chunk_about_once(
    environment: Radosgw, refs: list[ChunkRef], tmp_path: Path, ranks: int, nodes: int, cache_bytes: int
) -> None:
    """Ranks that share a node's cache: as many GETs as chunks, though the cache holds less than the dataset.
    Each on a node of its own: R - 1 boundaries between slices share a lane, so chunks x (1 + (R-1)/L) at most.
    """
    before, started = len(environment.gets("tiny")), time.monotonic()

    def work(rank: int, together: Barrier) -> None:
        cache_dir = tmp_path / f"node-{rank % nodes}"
        store = tiny_store(refs, cache_dir=cache_dir, cache_bytes=cache_bytes)
        read_epoch(
            store,
            refs.__getitem__,
            tiny_order(),
            rank=rank,
            ranks=ranks,
            batch=BATCH,
            together=together,
            check=is_its_number,
        )

    in_ranks(ranks, work)
    gets = environment.gets("tiny")[before:]
    predicted = CHUNKS * (1 + (ranks - 1) / LANES) if nodes > 1 else CHUNKS
    print(
        f"\n{ranks} ranks on {nodes} nodes: {len(gets)} GETs, {sum(gets):,} bytes; predicted {predicted:.0f}; "
        f"ratio {len(gets) / predicted:.4f}; {time.monotonic() - started:.0f} s",
        file=sys.stderr,
    )
    assert CHUNKS <= len(gets) <= 1.05 * predicted
    assert len(gets) * SAMPLES_A_CHUNK * SAMPLE_BYTES == sum(gets)


@pytest.mark.parametrize("start", [0, SAMPLES // 2 + 7 * BATCH, SAMPLES - BATCH])
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_first_batch_after_a_start_or_resume_fetches_what_its_lanes_need(
    environment: Radosgw, refs: list[ChunkRef], tmp_path: Path, start: int, ranks: int, ahead: bool
) -> None:
    """Its chunks and no others; and where a loader looks ahead meanwhile, its budget more at most."""
    order, needed, fetched, budget = tiny_order(), 0, 0.0, 16 << 20
    seconds = time.monotonic()
    for rank in range(ranks):  # each on a node of its own
        store = tiny_store(
            refs, cache_dir=tmp_path / f"{start}-{rank}", cache_bytes=1 << 30, prefetch_bytes=budget
        )
        own, soon = (
            order.locate(slice_batch(order.batch(first, BATCH), rank=rank, world_size=ranks))
            for first in (start, start + BATCH)
        )
        before = counters.snapshot()
        wanted = [*own[0].tolist(), *(soon[0].tolist() if ahead else ())]
        store.prefetch([refs[chunk] for chunk in dict.fromkeys(wanted)])
        for chunk, row in zip(*(part.tolist() for part in own), strict=True):
            assert is_its_number(chunk, row, store.read(refs[chunk], row))
        fetched += counters.since(before)["read_bytes"]
        needed += len(np.unique(own[0])) * SAMPLES_A_CHUNK * SAMPLE_BYTES
        store.close()
    print(
        f"\nfirst batch at {start} on {ranks} ranks{', looking ahead' if ahead else ''}: "
        f"{fetched / needed:.3f} of {needed / 1e6:.0f} MB in {time.monotonic() - seconds:.1f} s",
        file=sys.stderr,
    )
    assert needed <= fetched <= needed + (ranks * budget if ahead else 0)


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (4, 1), (8, 1), (4, 2)])
def test_small_data_is_fetched_once_a_node(
    environment: Radosgw, real_data: Path, tmp_path: Path, ranks: int, nodes: int
) -> None:
    """CIFAR-100's training set. A chunk is a part of all that an epoch mixes: each node loads each once."""
    bucket = f"cifar-{ranks}-{nodes}"
    environment.make_bucket(bucket)
    source = str(real_data / "cifar100-train.tar")
    assert main(["data", "pack", source, str(tmp_path / "packed"), "--seed", "1"]) == 0
    for path in sorted((tmp_path / "packed").iterdir()):
        open_storage(f"s3://{bucket}").put(path.name, path)
    index = open_index(f"s3://{bucket}")
    order = Order(chunk_samples=index.chunk_samples, seed=0, lanes=LANES)
    assert order.small
    before = len(environment.gets(bucket))

    def work(rank: int, together: Barrier) -> None:
        reader = ChunkReader(index, cache_dir=tmp_path / f"node-{rank % nodes}")
        read_epoch(
            reader.store,
            reader.chunk,
            order,
            rank=rank,
            ranks=ranks,
            batch=BATCH,
            together=together,
            check=lambda chunk, row, sample: len(sample.image) > 100,
        )

    in_ranks(ranks, work)
    gets = environment.gets(bucket)[before:]
    print(
        f"\n{ranks} ranks on {nodes} nodes: {len(gets)} GETs for {index.num_chunks} chunks", file=sys.stderr
    )
    assert len(gets) == index.num_chunks * nodes
