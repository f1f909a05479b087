"""The loader shows exactly the positions that it was asked for: from any start, on any ranks, over every border."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import write_dataset

from pretrain.data.augment import TrainTransform
from pretrain.data.index import DatasetIndex, open_samples
from pretrain.data.loader import TrainLoader
from pretrain.data.order import Order, sample_ends
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Segment, Source, Stream

N = 75
STARTS = {  # for lanes of 19 and 18 rows, blocks of 8 rows, the first of a lane shorter by its stagger
    "the beginning": 0,
    "an epoch's last batch": 72,
    "an epoch's end": N,
    "between two rows": 8,
    "a lane's first block's end": 4 * 6,
    "far away": 10**9 * N + 72,
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_dataset(tmp_path_factory.mktemp("positions") / "d", count=N)


def stream_of(index: DatasetIndex, kind: str) -> Stream:
    sizes = index.chunk_samples
    if kind == "small":
        return Stream(Order(chunk_samples=sizes, seed=5, lanes=32))
    if kind == "lanes":
        return Stream(Order(chunk_samples=sizes, seed=5, lanes=4, block_chunks=2))
    sources = [Source(dataset=0, chunk_samples=sizes)]
    without = [Source(dataset=0, chunk_samples=sizes, excluded=np.arange(9, dtype=np.int64))]
    segments = [Segment(sources, seed=5, lanes=4), Segment(without, seed=5, lanes=4, start=16, number=1)]
    return Stream(segments)


@pytest.mark.parametrize("kind", ["small", "lanes", "changed"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize(("world_size", "batch"), [(1, 8), (3, 8), (5, 8), (7, 96)])
def test_the_steps_from_a_position_on_are_the_positions_from_there_on_and_their_samples(
    index: DatasetIndex, kind: str, start: int, world_size: int, batch: int
) -> None:
    stream = stream_of(index, kind)
    ends = sample_ends(index.chunk_samples)
    keys = list(open_samples(index).keys)
    shown: list[dict[int, int]] = [{}, {}]  # of each step, position -> label
    for rank in range(world_size):
        loader = TrainLoader(
            readers=[ChunkReader(index)],
            stream=stream,
            transform=TrainTransform(image_size=4),
            seed=5,
            global_batch_size=batch,
            micro_batch_size=2,
            rank=rank,
            world_size=world_size,
            workers=0,
        )
        steps = loader.steps(start)
        for step, micro_batches in enumerate(islice(steps, 2)):
            for micro_batch in micro_batches:
                real = micro_batch["weights"] > 0
                assert (micro_batch["positions"][~real] == -1).all()
                pairs = zip(
                    micro_batch["positions"][real].tolist(), micro_batch["labels"][real].tolist(), strict=True
                )
                for position, label in pairs:
                    assert position not in shown[step], "two ranks have it"
                    shown[step][position] = label
        steps.close()  # type: ignore[attr-defined]
    for step in range(2):
        first = start + step * batch
        assert sorted(shown[step]) == list(range(first, first + batch))
        places = stream.locate(np.arange(first, first + batch))
        numbers = np.where(places.chunks > 0, ends[places.chunks - 1], 0).astype(np.int64) + places.rows
        for position, number in zip(range(first, first + batch), numbers.tolist(), strict=True):
            assert shown[step][position] == int(keys[number][1:]) % 10


def test_an_epoch_read_from_its_middle_and_one_read_from_its_beginning_hold_the_same(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=5)  # fewer than a batch: four epochs in one
    stream = stream_of(index, "small")
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=stream,
        transform=TrainTransform(image_size=4),
        seed=5,
        global_batch_size=20,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=0,
    )
    steps = loader.steps(0)
    (batch,) = next(steps)
    by_position = dict(zip(batch["positions"].tolist(), batch["labels"].tolist(), strict=True))
    for epoch in range(4):
        assert sorted(by_position[epoch * 5 + i] for i in range(5)) == [0, 1, 2, 3, 4]
