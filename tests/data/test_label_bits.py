"""The labels of multi-label samples from the tar to the batch, on any cut into ranks, workers and micro-batches."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from tiny_shards import jpeg, write_dataset

from pretrain.data.augment import EvalTransform, TrainTransform
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.label_bits import pack_label_sets, unpack_label_set
from pretrain.data.loader import Batch, EvalLoader, TrainLoader
from pretrain.data.mixup import Mixing
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Segment, Source, Stream
from pretrain.errors import DataError

CLASSES = 11
COUNT = 44
BROKEN = 9  # its image does not decode


def labels_of(i: int) -> list[int]:
    """Any number of labels, none for every fifth."""
    return sorted({i % CLASSES, (i * 7) % CLASSES, (i // 3) % CLASSES}) if i % 5 else []


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> DatasetIndex:
    from pretrain.cli import main

    folder = tmp_path_factory.mktemp("multi") / "d"
    folder.mkdir()
    with webdataset.TarWriter(str(folder / "shard-0.tar")) as writer:
        for i in range(COUNT):
            image = b"\xff\xd8 no image" if i == BROKEN else jpeg(i)
            label = json.dumps({"label": labels_of(i)}).encode()
            writer.write({"__key__": f"s{i:05d}", "jpg": image, "json": label})
    assert main(["data", "index", str(folder), "--chunk-samples", "4"]) == 0
    found = open_index(str(folder))
    assert (found.label_kind, found.num_classes) == ("multi", CLASSES)
    return found


def stream_of(*indexes: DatasetIndex) -> Stream:
    if len(indexes) == 1:
        return Stream(Order(chunk_samples=indexes[0].chunk_samples, seed=3, lanes=4, block_chunks=2))
    sources = [Source(dataset=d, chunk_samples=one.chunk_samples) for d, one in enumerate(indexes)]
    return Stream([Segment(sources, seed=3, lanes=4, start=0, number=0)], num_datasets=len(indexes))


def batches(*indexes: DatasetIndex, rank: int = 0, world_size: int = 1, **options: object) -> list[Batch]:
    settings = {"micro_batch_size": None, "workers": 0, "num_label_bits": CLASSES, **options}
    loader = TrainLoader(
        readers=[ChunkReader(index) for index in indexes],
        stream=stream_of(*indexes),
        transform=TrainTransform(image_size=8),
        seed=3,
        global_batch_size=8,
        rank=rank,
        world_size=world_size,
        **settings,  # type: ignore[arg-type]
    )
    steps = loader.steps(0)
    taken = [batch for step in islice(steps, 6) for batch in step]
    steps.close()
    return taken


def sets_by_position(taken: list[Batch]) -> dict[int, tuple[int, ...]]:
    found = {}
    for batch in taken:
        for i, weight in enumerate(batch["weights"].tolist()):
            labels = unpack_label_set(batch["label_bits"][i].numpy())
            if weight:
                found[int(batch["positions"][i])] = labels
            else:
                assert labels == ()
    return found


def test_every_position_carries_the_labels_of_its_sample_and_a_substitute_its_own(
    index: DatasetIndex,
) -> None:
    taken = batches(index)
    assert taken[0]["label_bits"].dtype == torch.uint8
    assert taken[0]["label_bits"].shape == (8, 2)
    assert (taken[0]["labels"] == -1).all()
    found, stream = sets_by_position(taken), stream_of(index)
    ends = np.cumsum(index.chunk_samples)

    def number(place: object) -> int:
        return int(ends[place.chunk] - index.chunk_samples[place.chunk] + place.row)  # type: ignore[attr-defined]

    replaced = 0
    for g, labels in found.items():
        places = stream.locate(np.array([g]))
        sample = int(ends[places.chunks[0]] - index.chunk_samples[places.chunks[0]] + places.rows[0])
        if sample == BROKEN:
            sample, replaced = number(next(iter(stream.substitutes(g)))), replaced + 1
        assert labels == tuple(labels_of(sample)), g
    assert replaced == 1
    assert len(found) == 48


@pytest.mark.parametrize("options", [{"micro_batch_size": 2}, {"workers": 2}, {"world_size": 3}])
def test_ranks_workers_and_micro_batches_change_no_label(
    index: DatasetIndex, options: dict[str, int]
) -> None:
    world_size = options.get("world_size", 1)
    found: dict[int, tuple[int, ...]] = {}
    for rank in range(world_size):
        found |= sets_by_position(batches(index, rank=rank, **{**options, "world_size": world_size}))
    assert found == sets_by_position(batches(index))


def test_single_labels_beside_multi_labels_are_one_bit(index: DatasetIndex, tmp_path: Path) -> None:
    single = write_dataset(tmp_path / "single", count=40)
    found, stream = sets_by_position(batches(index, single)), stream_of(index, single)
    places = stream.locate(np.array(sorted(found)))
    for g, dataset, chunk, row in zip(sorted(found), *places, strict=True):
        if dataset == 1:
            assert found[g] == ((int(chunk) * 4 + int(row)) % 10,)
    assert 0 < sum(places.datasets) < len(found)


def test_validation_carries_them_too_and_none_where_an_image_does_not_decode(index: DatasetIndex) -> None:
    loader = EvalLoader(
        reader=ChunkReader(index),
        transform=EvalTransform(image_size=8),
        batch_size=16,
        num_label_bits=CLASSES,
    )
    taken = list(loader)
    assert not taken[0]["weights"][BROKEN]
    assert not taken[0]["label_bits"][BROKEN].any()
    wanted = {i: tuple(labels_of(i)) for i in range(COUNT) if i != BROKEN}
    assert sets_by_position(taken) == wanted


def test_data_with_one_label_each_carries_no_bits(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "single", count=40)
    assert "label_bits" not in batches(index, num_label_bits=None)[0]


def test_mixing_tells_each_sample_its_partners_bits(index: DatasetIndex) -> None:
    batch = batches(index)[0]
    told = Mixing(seed=0, mixup=1.0)(batch["images"].float(), batch)[1]  # type: ignore[arg-type]
    assert torch.equal(told["other_label_bits"][0::2], batch["label_bits"][1::2])
    assert torch.equal(told["other_label_bits"][1::2], batch["label_bits"][0::2])


def test_packing_and_unpacking_bits_gives_the_sets_back() -> None:
    sets = [(0, 8, 15), (), (7,), (16,)]
    values = np.array([label for one in sets for label in one])
    bits = pack_label_sets(np.array([len(one) for one in sets]), values, num_classes=17)
    assert bits.shape == (4, 3)
    assert [unpack_label_set(row) for row in bits] == sets
    with pytest.raises(DataError, match="label 16 where labels 0 to 15 are expected"):
        pack_label_sets(np.array([len(one) for one in sets]), values, num_classes=16)
