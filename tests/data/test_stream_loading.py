"""The loader over a mixture that changes: what the stream names is what ranks get, and validation sees all once."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data.tiny_shards import jpeg, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.augment import TrainTransform
from pretrain.data.index import DatasetIndex, open_samples
from pretrain.data.loader import TrainLoader
from pretrain.data.order import PAD, validation_slice
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Segment, Source, Stream

B = 8
STEPS = 24


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[DatasetIndex]:
    root = tmp_path_factory.mktemp("mixture")
    return [
        write_dataset(root / "a", count=75),
        write_dataset(root / "b", count=31, image=lambda i: jpeg(1000 + i)),
    ]


def make_stream(indexes: list[DatasetIndex]) -> Stream:
    """One dataset; a mixture from the middle of step 7's batch on; without half of the first from step 15 on."""
    sizes = [index.chunk_samples for index in indexes]
    half = np.arange(0, 75, 2)
    common = {"seed": 3, "lanes": 4, "block_chunks": 2}
    return Stream(
        [
            Segment([Source(dataset=0, chunk_samples=sizes[0])], **common),
            Segment(
                [Source(dataset=d, chunk_samples=sizes[d], weight=w) for d, w in ((1, 1.0), (0, 3.0))],
                start=7 * B + 4,
                number=1,
                **common,
            ),
            Segment(
                [
                    Source(dataset=0, chunk_samples=sizes[0], excluded=half),
                    Source(dataset=1, chunk_samples=sizes[1]),
                ],
                start=15 * B,
                number=2,
                **common,
            ),
        ]
    )


def seen(
    indexes: list[DatasetIndex], *, world_size: int, workers: int, start: int, steps: int
) -> dict[int, tuple]:
    """Position -> (label, digest of the pixels) over all ranks."""
    found = {}
    for rank in range(world_size):
        loader = TrainLoader(
            readers=[ChunkReader(index) for index in indexes],
            stream=make_stream(indexes),
            transform=TrainTransform(image_size=12),
            seed=3,
            global_batch_size=B,
            micro_batch_size=None,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
        iterator = loader.steps(start * B)
        for batch in (micro for step in islice(iterator, steps) for micro in step):
            for i in np.flatnonzero(batch["weights"].numpy()).tolist():
                digest = hashlib.sha256(batch["images"][i].numpy().tobytes()).hexdigest()
                position = int(batch["positions"][i])
                assert position not in found
                found[position] = (int(batch["labels"][i]), digest)
        iterator.close()  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def reference(indexes: list[DatasetIndex]) -> dict[int, tuple]:
    return seen(indexes, world_size=1, workers=0, start=0, steps=STEPS)


def test_samples_are_those_that_the_stream_names(indexes: list[DatasetIndex], reference: dict) -> None:
    stream = make_stream(indexes)
    places = stream.locate(np.arange(STEPS * B))
    tables = [open_samples(index) for index in indexes]
    numbers = [
        int(indexes[d].chunk_samples[:chunk].sum()) + row
        for d, chunk, row in zip(*(column.tolist() for column in places), strict=True)
    ]
    labels = [int(tables[d].labels[n]) for d, n in zip(places.datasets.tolist(), numbers, strict=True)]
    assert [reference[g][0] for g in range(STEPS * B)] == labels
    assert set(places.datasets[: 7 * B + 4]) == {0}
    assert set(places.datasets[7 * B + 4 :]) == {0, 1}
    without = [n for d, n in list(zip(places.datasets, numbers, strict=True))[15 * B :] if d == 0]
    assert without
    assert all(n % 2 for n in without)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 2), (4, 0)])
def test_ranks_workers_and_resumes_on_either_side_of_a_change_do_not_enter(
    indexes: list[DatasetIndex], reference: dict, world_size: int, workers: int
) -> None:
    for start, steps in ((0, 6), (5, 5), (7, 1), (14, 3), (15, STEPS - 15)):
        got = seen(indexes, world_size=world_size, workers=workers, start=start, steps=steps)
        assert got == {g: reference[g] for g in range(start * B, (start + steps) * B)}


@settings(max_examples=100, deadline=None)
@given(num_samples=st.integers(0, 400), world_size=st.integers(1, 64), batch_size=st.integers(1, 33))
def test_validation_shows_each_sample_once_in_equally_many_batches_on_any_ranks(
    num_samples: int, world_size: int, batch_size: int
) -> None:
    slices = [validation_slice(num_samples, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = {-(-len(own) // batch_size) for own in slices}  # as `EvalLoader` cuts them
    assert len(batches) == 1
    assert len({len(own) for own in slices}) == 1
    shown = np.concatenate(slices)
    assert shown[shown != PAD].tolist() == list(range(num_samples))


def test_a_stream_of_other_datasets_than_the_readers_is_not_taken(
    indexes: list[DatasetIndex], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="of other datasets"):
        TrainLoader(
            readers=[ChunkReader(index) for index in reversed(indexes)],
            stream=make_stream(indexes),
            transform=TrainTransform(image_size=12),
            seed=3,
            global_batch_size=B,
            micro_batch_size=None,
            rank=0,
            world_size=1,
            workers=0,
        )
