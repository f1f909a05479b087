"""One stream of samples, whatever reads it: ranks, workers, stops and restarts, and storage in bad weather.

A real S3 server behind a proxy that breaks about every third answer. Two images do not decode, so that
replacing them is part of it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
from data.tiny_shards import jpeg, write_dataset
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.data.augment import TrainTransform
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.loader import TrainLoader
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream
from pretrain.storage import RetryPolicy, S3Settings, open_storage

COUNT, B, STEPS, SEED = 192, 24, 12, 9  # an epoch and a half
BAD = (5, 100)
S3 = S3Settings(
    read_timeout_seconds=0.5,
    retry=RetryPolicy(attempts=100, seconds=100.0, first_delay_seconds=0.01, longest_delay_seconds=0.1),
)

Seen = dict[int, str]  # position -> hash of what stood there


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_dataset(
        tmp_path_factory.mktemp("stream") / "d",
        count=COUNT,
        image=lambda i: b"not an image" if i in BAD else jpeg(i, (40, 30)),
    )


class Weather:
    """Breaks every third answer, in ways drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.made = 0

    def __call__(self, method: str) -> Fault | None:
        if method != "GET" or self._draw.random() > 0.3:
            return None
        self.made += 1
        kind = self._draw.choice(["503", "503", "close", "reset", "stall", "drip"])
        after = self._draw.choice([0, 300, 1500, 4000])
        return Fault(kind=kind, after_bytes=after, bytes_per_second=20_000)


@pytest.fixture
def remote(
    local: DatasetIndex, s3_bucket: str, s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[DatasetIndex, FaultProxy]]:
    store = open_storage(f"{s3_bucket}/d", s3=S3)
    for path in sorted(Path(local.url).iterdir()):
        store.put(path.name, path.read_bytes())
    index = open_index(f"{s3_bucket}/d", s3=S3)
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield index, proxy


def read(
    index: DatasetIndex,
    *,
    ranks: int,
    workers: int,
    cache_dir: Path | None,
    start: int,
    end: int,
) -> Seen:
    """What all ranks see at steps [start, end)."""
    seen: Seen = {}
    for rank in range(ranks):
        loader = TrainLoader(
            readers=[ChunkReader(index, cache_dir=cache_dir, s3=S3)],
            stream=Stream(Order(chunk_samples=index.chunk_samples, seed=SEED, lanes=4, block_chunks=2)),
            transform=TrainTransform(image_size=12),
            seed=SEED,
            global_batch_size=B,
            micro_batch_size=None,
            rank=rank,
            world_size=ranks,
            workers=workers,
        )
        for step in islice(loader.steps(start * B), end - start):
            replaced = {line.g: f"{line.key} {line.substitute_key}" for line in loader.replaced()}
            for batch in step:
                for i, g in enumerate(batch["positions"].tolist()):
                    if g < 0:
                        continue
                    assert g not in seen
                    parts = [batch[name][i].numpy().tobytes() for name in ("images", "labels", "draws")]
                    digest = hashlib.sha256(b"".join([*parts, replaced.get(g, "").encode()]))
                    seen[g] = digest.hexdigest()
        loader.close()
    return seen


def digest(seen: Seen) -> str:
    lines = "".join(f"{g} {seen[g]}\n" for g in sorted(seen))
    return hashlib.sha256(lines.encode()).hexdigest()


@pytest.fixture(scope="module")
def reference(local: DatasetIndex) -> str:
    seen = read(local, ranks=1, workers=0, cache_dir=None, start=0, end=STEPS)
    assert sorted(seen) == list(range(STEPS * B))
    return digest(seen)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
def test_one_hash_over_ranks_workers_stops_and_faults(
    remote: tuple[DatasetIndex, FaultProxy], reference: str, tmp_path: Path, ranks: int, workers: int
) -> None:
    index, proxy = remote
    draw = random.Random(100 * ranks + workers)
    stops = sorted(draw.sample(range(1, STEPS), 2))
    seen: Seen = {}
    proxy.weather = weather = Weather(ranks + workers)
    for number, (start, end) in enumerate(pairwise([0, *stops, STEPS])):
        # Each time on another node, with nothing in its cache.
        cache_dir = tmp_path / f"node-{number}"
        seen |= read(index, ranks=ranks, workers=workers, cache_dir=cache_dir, start=start, end=end)
    assert weather.made > 5
    assert digest(seen) == reference


def test_one_hash_when_every_segment_has_other_ranks_and_workers(
    remote: tuple[DatasetIndex, FaultProxy], reference: str, tmp_path: Path
) -> None:
    index, proxy = remote
    seen: Seen = {}
    proxy.weather = Weather(1)
    for number, (start, end, ranks, workers) in enumerate([(0, 3, 1, 2), (3, 8, 3, 0), (8, 12, 2, 1)]):
        cache_dir = None if number == 1 else tmp_path / f"node-{number}"
        seen |= read(index, ranks=ranks, workers=workers, cache_dir=cache_dir, start=start, end=end)
    assert digest(seen) == reference
