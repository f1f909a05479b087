from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import write_dataset

from pretrain.data.augment import EvalTransform, TrainTransform
from pretrain.data.index import DatasetIndex, open_samples
from pretrain.data.loader import Batch, EvalLoader, TrainLoader
from pretrain.data.order import Order, locate_sample, sample_ends
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream

B = 8
SEED = 5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_dataset(tmp_path_factory.mktemp("loader") / "d", count=75)


def make_order(index: DatasetIndex) -> Order:
    order = Order(chunk_samples=index.chunk_samples, seed=SEED, lanes=4, block_chunks=2)
    assert not order.small
    return order


def make_loader(index: DatasetIndex, *, rank: int = 0, world_size: int = 1, **options: object) -> TrainLoader:
    transform = TrainTransform(image_size=12)
    settings = {"global_batch_size": B, "micro_batch_size": None, "workers": 0, **options}
    return TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(make_order(index)),
        transform=transform,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        **settings,  # type: ignore[arg-type]
    )


def take(loader: TrainLoader, steps: int, start: int = 0) -> list[list[Batch]]:
    iterator = loader.steps(start)
    taken = list(islice(iterator, steps))
    iterator.close()  # type: ignore[attr-defined]
    return taken


def contents(batch: Batch) -> Iterator[tuple[int, str]]:
    """(position, digest of everything else) of the samples that count."""
    for i in range(len(batch["weights"])):
        if batch["weights"][i]:
            parts = [batch[name][i].numpy().tobytes() for name in ("images", "labels", "draws")]
            yield int(batch["positions"][i]), hashlib.sha256(b"".join(parts)).hexdigest()
        else:
            assert batch["positions"][i] == -1
            assert not batch["images"][i].any()
            assert batch["labels"][i] == 0


def stream(
    index: DatasetIndex, *, steps: int, world_size: int, start: int = 0, **options: object
) -> list[list]:
    """For each step, what all ranks see together."""
    whole: list[list] = [[] for _ in range(steps)]
    for rank in range(world_size):
        loader = make_loader(index, rank=rank, world_size=world_size, **options)
        for k, micro_batches in enumerate(take(loader, steps, start)):
            whole[k] += [item for batch in micro_batches for item in contents(batch)]
    return whole


@pytest.fixture(scope="module")
def reference(index: DatasetIndex) -> list[list]:
    """Twelve steps, across an epoch's end, with one rank in one process."""
    return stream(index, steps=12, world_size=1)


def test_samples_carry_the_label_and_pixels_of_the_sample_that_the_order_names(index: DatasetIndex) -> None:
    order, table, reader = make_order(index), open_samples(index), ChunkReader(index)
    starts = np.concatenate([[0], np.cumsum(index.chunk_samples)[:-1]])
    for batch in [micro for step in take(make_loader(index), 11) for micro in step]:
        positions = batch["positions"].numpy()
        chunks, rows = order.locate(positions)
        numbers = starts[chunks] + rows
        assert batch["labels"].tolist() == table.labels[numbers].tolist()
        for i, number in enumerate(numbers.tolist()):
            raw = reader.read(int(chunks[i]), int(rows[i]))
            assert raw.key == table.key(number) == f"s{number:05d}"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_workers_do_not_enter_into_what_a_step_sees(
    index: DatasetIndex, reference: list[list], world_size: int, workers: int
) -> None:
    assert stream(index, steps=12, world_size=world_size, workers=workers) == reference
    positions = [position for step in reference for position, _ in step]
    assert sorted(positions) == list(range(12 * B))


def test_a_run_resumed_at_another_world_size_sees_what_the_uninterrupted_one_would(
    index: DatasetIndex, reference: list[list]
) -> None:
    assert stream(index, steps=5, world_size=3, start=7 * B, workers=2) == reference[7:]


@pytest.mark.parametrize(("micro_batch_size", "count"), [(2, 4), (4, 2), (6, 2), (8, 1), (64, 1)])
def test_micro_batches_are_cuts_of_one_shape_whose_last_is_padded(
    index: DatasetIndex, reference: list[list], micro_batch_size: int, count: int
) -> None:
    loader = make_loader(index, micro_batch_size=micro_batch_size)
    size = min(micro_batch_size, B)
    for k, step in enumerate(take(loader, 3)):
        assert len(step) == count == loader.micro_batches
        assert {tuple(batch["images"].shape) for batch in step} == {(size, 3, 12, 12)}
        assert [item for batch in step for item in contents(batch)] == reference[k]
        assert all(batch["weights"].all() for batch in step[:-1])


def test_all_ranks_run_equally_many_micro_batches_of_one_shape(index: DatasetIndex) -> None:
    shapes = set()
    for rank in range(3):  # slices of 4, 2 and 2 samples
        for step in take(make_loader(index, rank=rank, world_size=3, micro_batch_size=2), 2):
            shapes.add(tuple(tuple(batch["images"].shape) for batch in step))
    assert shapes == {((2, 3, 12, 12), (2, 3, 12, 12))}


def test_batches_have_the_stated_types(index: DatasetIndex) -> None:
    batch = take(make_loader(index, workers=2), 1)[0][0]
    wanted = {
        "images": torch.uint8,
        "labels": torch.int64,
        "weights": torch.float32,
        "positions": torch.int64,
        "draws": torch.float32,
    }
    assert {name: tensor.dtype for name, tensor in batch.items()} == wanted  # type: ignore[attr-defined]


def test_loading_draws_nothing_from_the_global_random_generators(index: DatasetIndex) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(make_loader(index, workers=2), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once_and_equally_many_batches_on_all_ranks(
    index: DatasetIndex, world_size: int, workers: int
) -> None:
    seen = {}
    for rank in range(world_size):
        loader = EvalLoader(
            reader=ChunkReader(index),
            transform=EvalTransform(image_size=12),
            batch_size=7,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
        batches = list(loader)
        assert len(batches) == len(loader) == math.ceil(math.ceil(75 / world_size) / 7)
        assert {tuple(batch["images"].shape) for batch in batches} == {(7, 3, 12, 12)}
        seen.update({rank_item: rank for batch in batches for rank_item in contents(batch)})
    assert sorted(position for position, _ in seen) == list(range(75))
    ends = sample_ends(index.chunk_samples)
    transform = EvalTransform(image_size=12)
    digests = dict(seen.keys())
    reader = ChunkReader(index)
    for number in (0, 33, 74):
        chunk, row = locate_sample(ends, np.array([number]))
        raw = reader.read(int(chunk[0]), int(row[0]))
        pixels = transform(raw.image, name="a").pixels.tobytes()
        assert digests[number] == hashlib.sha256(pixels + np.int64(raw.label).tobytes()).hexdigest()


def test_workers_ignore_the_signals_that_their_parent_handles(index: DatasetIndex, reference: list) -> None:
    iterator = make_loader(index, workers=2).steps(0)
    seen = [next(iterator)]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    seen += list(islice(iterator, 11))
    assert [[item for batch in step for item in contents(batch)] for step in seen] == reference
    assert all(worker.is_alive() for worker in workers)
    iterator.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in workers)


def test_closing_a_loader_stops_the_workers_of_iterations_under_way(index: DatasetIndex) -> None:
    loader = make_loader(index, workers=2)
    iterator = loader.steps(0)
    next(iterator)
    workers = multiprocessing.active_children()
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 2
    assert not any(worker.is_alive() for worker in workers)


PARENT = """
import multiprocessing, pickle, sys, time
from pretrain.data.loader import TrainLoader

if __name__ == "__main__":
    iterator = TrainLoader(**pickle.load(open(sys.argv[1], "rb"))).steps(0)
    next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_no_worker_outlives_its_parent(index: DatasetIndex, tmp_path: Path, end: str) -> None:
    settings = {
        "readers": [ChunkReader(index)],
        "stream": Stream(make_order(index)),
        "transform": TrainTransform(image_size=12),
        "seed": 0,
        "global_batch_size": B,
        "micro_batch_size": None,
        "rank": 0,
        "world_size": 1,
        "workers": 2,
    }
    (tmp_path / "settings").write_bytes(pickle.dumps(settings))
    (tmp_path / "parent.py").write_text(PARENT)
    mode = "wait" if end == "kill" else end
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "settings"), mode]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end == "kill":
            assert all(is_running(pid) for pid in pids)
            parent.kill()
        code = parent.wait(timeout=30)
    assert code == (-signal.SIGKILL if end == "kill" else 0)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers live on without their parent"
        time.sleep(0.05)
