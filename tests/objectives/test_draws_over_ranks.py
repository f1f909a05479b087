"""Masks, mixup partners and drop-path draws of every sample on 1, 2 and 3 ranks, with 0 and 2 loader workers.

The ranks' loaders are gone through in one process, and what is drawn for each position is laid beside what one rank
without workers draws: bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from tiny_shards import write_dataset

from pretrain.data.augment import DeviceTransform, TrainTransform
from pretrain.data.index import DatasetIndex
from pretrain.data.loader import Batch, TrainLoader
from pretrain.data.mixup import Mixing
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream
from pretrain.keyed_random import sample_keys
from pretrain.models.drop_path import branch_scales
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM

B, SIDE, SEED, STEPS = 10, 16, 5, 4
MIXING = Mixing(seed=SEED, mixup=0.8, cutmix=1.0)
PIXELS = DeviceTransform(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), color_jitter=0.4)


def vit() -> VisionTransformer:
    return VisionTransformer(image_size=SIDE, patch_size=4, embed_dim=16, depth=2, num_heads=2)


MASKED = {
    "mae vit": MAE(vit(), seed=SEED, decoder_dim=8, decoder_depth=1, decoder_heads=2),
    "simmim vit": SimMIM(vit(), seed=SEED, mask_patch_size=4),
    "simmim swin": SimMIM(
        SwinTransformer(image_size=SIDE, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2),
        seed=SEED,
        mask_patch_size=4,
    ),
    "simmim pvt": SimMIM(
        PyramidVisionTransformer(
            image_size=SIDE,
            embed_dims=(8, 16),
            depths=(1, 1),
            num_heads=(1, 2),
            mlp_ratios=(2.0, 2.0),
            sr_ratios=(2, 1),
        ),
        seed=SEED,
        mask_patch_size=4,
    ),
}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_dataset(tmp_path_factory.mktemp("draws") / "d", count=70)


def steps_of(index: DatasetIndex, *, rank: int, world_size: int, workers: int) -> Iterator[list[Batch]]:
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(Order(chunk_samples=index.chunk_samples, seed=SEED, lanes=2, block_chunks=2)),
        transform=TrainTransform(image_size=SIDE),
        seed=SEED,
        global_batch_size=B,
        micro_batch_size=4,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )
    steps = loader.steps(0)
    yield from islice(steps, STEPS)
    steps.close()  # type: ignore[attr-defined]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def drawn(batch: Batch) -> Iterator[tuple[int, dict[str, object]]]:
    """Of each sample that counts, its position and all that is drawn for it on the device."""
    images, told = MIXING(PIXELS(batch["images"], batch["draws"]), dict(batch))
    keys = sample_keys(SEED, batch["positions"])
    depth = branch_scales(keys, rate=0.5, depth=4, dtype=torch.float32)
    # the first of a reconstruction is what the network sees: zeros where it is masked
    seen = {
        name: module.reconstruct(torch.ones_like(images), batch["positions"])[0]
        for name, module in MASKED.items()
    }
    partners = batch["positions"].unflatten(0, (-1, 2)).flip(1).flatten()
    for i in range(len(batch["weights"])):
        if batch["weights"][i]:
            yield (
                int(batch["positions"][i]),
                {
                    "partner": int(partners[i]),
                    "other label": int(told["other_labels"][i]),
                    "own share": float(told["own_share"][i]),
                    "mixed pixels": digest(images[i]),
                    "drop path": digest(depth[i]),
                    **{f"{name} mask": digest(shown[i]) for name, shown in seen.items()},
                },
            )


def over(index: DatasetIndex, *, world_size: int, workers: int) -> dict[int, dict[str, object]]:
    found: dict[int, dict[str, object]] = {}
    for rank in range(world_size):
        for step in steps_of(index, rank=rank, world_size=world_size, workers=workers):
            for batch in step:
                for position, draws in drawn(batch):
                    assert position not in found
                    found[position] = draws
    return found


@pytest.fixture(scope="module")
def alone(index: DatasetIndex) -> dict[int, dict[str, object]]:
    return over(index, world_size=1, workers=0)


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 0), (1, 2), (2, 2), (3, 2)])
def test_masks_partners_and_drop_path_of_each_sample_are_the_same_on_any_ranks_and_workers(
    index: DatasetIndex, alone: dict[int, dict[str, object]], world_size: int, workers: int
) -> None:
    assert over(index, world_size=world_size, workers=workers) == alone


def test_what_is_drawn_differs_from_sample_to_sample_and_covers_every_position(
    alone: dict[int, dict[str, object]],
) -> None:
    """The comparison above could see a difference."""
    assert sorted(alone) == list(range(STEPS * B))
    for name in ("own share", "mixed pixels", "drop path", *(f"{one} mask" for one in MASKED)):
        values = {draws[name] for draws in alone.values()}
        assert len(values) >= STEPS * B // 4, name
    for position, draws in alone.items():
        assert alone[int(draws["partner"])]["partner"] == position  # type: ignore[call-overload]
