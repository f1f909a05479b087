"""A pass over chosen samples: each once over any number of ranks, in order, with as many batches on each."""

import numpy as np
import pytest
from tiny_shards import write_dataset

from pretrain.data.augment import EvalTransform
from pretrain.data.loader import EvalLoader
from pretrain.data.order import PAD
from pretrain.data.reader import ChunkReader


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "shards", count=50)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("chosen", [[3, 4, 9, 20, 21, 30, 47], [49], list(range(0, 50, 3))])
def test_each_chosen_sample_comes_once_in_order_and_ranks_have_equal_counts_of_batches(
    index, chosen, world_size
):
    positions, labels, batches = [], [], []
    for rank in range(world_size):
        loader = EvalLoader(
            reader=ChunkReader(index),
            samples=np.array(chosen),
            transform=EvalTransform(image_size=8),
            batch_size=2,
            rank=rank,
            world_size=world_size,
        )
        own = list(loader)
        assert len(own) == len(loader)
        batches.append([len(batch["images"]) for batch in own])
        for batch in own:
            real = batch["weights"] > 0
            assert (batch["positions"][~real] == PAD).all()
            positions += batch["positions"][real].tolist()
            labels += batch["labels"][real].tolist()
    assert positions == chosen
    assert labels == [number % 10 for number in chosen]
    assert all(one == batches[0] for one in batches)
