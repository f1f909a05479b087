"""What workers are told: their samples, what they need soon, and labels that the index holds instead of the tars."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from tiny_shards import jpeg, write_dataset

from pretrain.data import tasks
from pretrain.data.augment import TrainTransform
from pretrain.data.index import DatasetIndex, open_samples
from pretrain.data.loader import TrainLoader
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader, ChunkRef
from pretrain.data.stream import Stream
from pretrain.data.tasks import Plan, Planner

COUNT, B, BAD = 240, 24, 17


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    folder = tmp_path_factory.mktemp("tasks") / "d"
    return write_dataset(folder, count=COUNT, image=lambda i: b"?" if i == BAD else jpeg(i))


def stream_of(index: DatasetIndex) -> Stream:
    return Stream(Order(chunk_samples=index.chunk_samples, seed=3, lanes=4, block_chunks=2))


def plans(index: DatasetIndex, count: int, *, workers: int, prefetch_bytes: int) -> list[Plan]:
    stream = stream_of(index)

    def slices() -> Iterator[np.ndarray]:
        start = 0
        while True:
            yield stream.batch(start, B)
            start += B

    planner = Planner(
        readers=[ChunkReader(index)],
        slices=slices(),
        locate=stream.locate,
        workers=workers,
        prefetch_bytes=prefetch_bytes,
    )
    return list(islice(iter(planner), count))


def in_a_bucket(index: DatasetIndex) -> DatasetIndex:
    return dataclasses.replace(index, url="s3://bucket/d")


@pytest.mark.parametrize("workers", [1, 3])
def test_looking_ahead_does_not_change_what_is_planned(index: DatasetIndex, workers: int) -> None:
    near = plans(index, 30, workers=workers, prefetch_bytes=0)
    far = plans(in_a_bucket(index), 30, workers=workers, prefetch_bytes=1 << 30)
    for one, other in zip(near, far, strict=True):
        assert np.array_equal(one.positions, other.positions)
        for task, same in zip(one.tasks, other.tasks, strict=True):
            assert task.chunks == same.chunks
            for name in ("positions", "chunk_of", "rows"):
                assert np.array_equal(getattr(task, name), getattr(same, name))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_chunk_is_announced_to_its_worker_before_it_is_due(index: DatasetIndex, workers: int) -> None:
    due = plans(in_a_bucket(index), 40, workers=workers, prefetch_bytes=20_000)
    for worker in range(workers):
        announced: dict[tuple[int, ChunkRef], int] = {}
        early = late = 0
        for number, plan in enumerate(due):
            task = plan.tasks[worker]
            # Its own chunks come first, for they are wanted first.
            assert set(task.soon[: len(plan.new[worker])]) <= set(task.chunks)
            for chunk in task.soon:
                announced.setdefault(chunk, number)
            for chunk in task.chunks:
                assert chunk in announced, "a chunk that nobody spoke of"
            for chunk in plan.new[worker]:
                early += announced[chunk] < number
                late += number > 1 and announced[chunk] == number
        assert set(due[0].tasks[worker].soon) <= set(due[0].tasks[worker].chunks), (
            "nothing before the first batch"
        )
        assert early > 20
        assert early > 9 * late


def test_what_is_announced_and_not_yet_due_keeps_to_its_budget(index: DatasetIndex) -> None:
    budget, workers = 20_000, 2
    due = plans(in_a_bucket(index), 40, workers=workers, prefetch_bytes=budget)
    largest_step = max(plan.new_bytes() for plan in due)
    for plan in due:
        ahead = [
            chunk.num_bytes
            for task, new in zip(plan.tasks, plan.new, strict=True)
            for _, chunk in task.soon[len(new) :]
        ]
        assert sum(ahead) <= budget * workers + largest_step


def test_nothing_is_announced_for_local_shards_or_without_a_budget(index: DatasetIndex) -> None:
    for one, budget in ((index, 1 << 30), (in_a_bucket(index), 0)):
        for plan in plans(one, 10, workers=2, prefetch_bytes=budget):
            assert all(task.soon == () for task in plan.tasks)


def make_loader(index: DatasetIndex, workers: int) -> TrainLoader:
    return TrainLoader(
        readers=[ChunkReader(index)],
        stream=stream_of(index),
        transform=TrainTransform(image_size=8),
        seed=3,
        global_batch_size=B,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=workers,
    )


def labels_by_position(loader: TrainLoader, steps: int) -> dict[int, int]:
    found = {}
    for step in islice(loader.steps(0), steps):
        for batch in step:
            found |= dict(zip(batch["positions"].tolist(), batch["labels"].tolist(), strict=True))
    loader.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_of_the_index_replace_those_of_the_tars_for_substitutes_too(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    table = open_samples(index)
    other = dataclasses.replace(table, labels=np.arange(COUNT)[::-1].astype(table.labels.dtype))
    overridden = copy.copy(index)
    object.__setattr__(overridden, "labels_overridden", True)
    monkeypatch.setattr(tasks, "open_samples", lambda index, **options: other)
    loader = make_loader(overridden, workers)
    found = labels_by_position(loader, COUNT // B)
    order = Order(chunk_samples=index.chunk_samples, seed=3, lanes=4, block_chunks=2)
    starts = np.cumsum(index.chunk_samples) - index.chunk_samples
    for g in range(COUNT):
        chunk, row = (int(value[0]) for value in order.locate([g]))
        if starts[chunk] + row == BAD:
            chunk, row = next(order.substitutes(g))
        assert found[g] == COUNT - 1 - (starts[chunk] + row)


def test_labels_of_the_tars_count_otherwise(index: DatasetIndex) -> None:
    found = labels_by_position(make_loader(index, 2), COUNT // B)
    assert sorted(set(found.values())) == list(range(10))


def test_counters_of_workers_reach_the_trainer(index: DatasetIndex) -> None:
    loader = make_loader(index, 2)
    steps = loader.steps(0)
    replaced = 0
    for _ in range(2 * COUNT // B):
        next(steps)
        gained = loader.gained()
        assert gained["worker_restarts"] == 0
        replaced += int(gained["samples_replaced"])
    assert replaced == 2
    loader.close()
