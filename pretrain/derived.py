"""What follows from a recipe without training: batch split, steps, samples, cost. No torch.

Called by train.py before anything is built, and printed by `--dry-run`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.schema import RunConfig
from pretrain.data.index import INDEX_NAME, DatasetIndex
from pretrain.data.order import Order, lanes_for
from pretrain.errors import ConfigError
from pretrain.models.sizes import resolve_size
from pretrain.models.spec import BackboneSpec
from pretrain.storage import S3Settings, is_remote

# One device debugs on few samples at a time: fewer open chunks, seconds to the first step.
DEBUG_LANES = 8


def s3_settings(config: RunConfig) -> S3Settings:
    return S3Settings(addressing_style=config.storage.addressing_style, checksums=config.storage.checksums)


def backbone_spec(
    config: RunConfig, *, num_classes: int | None = None, class_names: tuple[str, ...] | None = None
) -> BackboneSpec:
    """The backbone a recipe describes, in plain values."""
    model = config.model
    size = resolve_size(
        size=model.size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
    )
    return BackboneSpec(
        image_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        pooling=model.pooling,
        position_embedding=model.position_embedding,
        num_classes=num_classes,
        class_names=class_names,
        mean=config.data.mean,
        std=config.data.std,
    )


def is_image_source(url: str) -> bool:
    """A local folder without shards, or a tar without an index beside it."""
    path = Path(url)
    if is_remote(url):
        return False
    if path.is_file() and path.suffix == ".tar":
        return True
    return path.is_dir() and not any(path.glob("*.tar")) and not (path / INDEX_NAME).is_file()


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one global batch is cut over ranks and micro-batches.

    slice_size: images a rank gets a step, pads included. micro_batch_size: images in one forward.
    """

    world_size: int
    slice_size: int
    micro_batch_size: int
    accumulation_steps: int


def split_batch(config: RunConfig, world_size: int) -> Split:
    pairs = config.train.global_batch_size // 2
    slice_size = 2 * math.ceil(pairs / world_size)
    micro = min(config.train.micro_batch_size or slice_size, slice_size)
    return Split(
        world_size=world_size,
        slice_size=slice_size,
        micro_batch_size=micro,
        accumulation_steps=math.ceil(slice_size / micro),
    )


def total_steps(config: RunConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run; the last epoch is rounded up to a whole batch."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None, "the schema wants steps or epochs"
    return max(1, math.ceil(config.train.epochs * num_samples / config.train.global_batch_size))


def run_lanes(config: RunConfig, *, debug: bool = False) -> int:
    lanes = lanes_for(config.train.global_batch_size)
    return lanes_for(min(lanes, DEBUG_LANES)) if debug and lanes % DEBUG_LANES == 0 else lanes


def build_order(config: RunConfig, index: DatasetIndex, *, lanes: int) -> Order:
    return Order(chunk_samples=index.chunk_samples, seed=config.seed, lanes=lanes)


def num_classes_for(config: RunConfig, index: DatasetIndex) -> int | None:
    """Classes of the head, or None for an objective without one.

    Raises ConfigError when the data has no labels, or more classes than the recipe has room for.
    """
    if config.objective.name != "classification":
        return None
    if index.num_classes is None:
        raise ConfigError(
            f"{index.url} has no labels, and objective.name=classification needs them; "
            "pack an image folder with one folder a class, or take objective.name=mae"
        )
    if index.label_kind == "multi":
        raise ConfigError(
            f"{index.url} is multi-label data, which needs a sigmoid objective, and objective.name=classification "
            "wants one label an image; pack one label each, or take objective.name=mae"
        )
    wanted = config.objective.num_classes
    if wanted is not None and wanted < index.num_classes:
        raise ConfigError(
            f"objective.num_classes={wanted}, but {index.url} has labels up to {index.num_classes - 1}; "
            f"set it to {index.num_classes} or leave it out"
        )
    return wanted or index.num_classes


def check_validation_labels(val_index: DatasetIndex, index: DatasetIndex, num_classes: int | None) -> None:
    """Raises ConfigError when the validation data cannot be judged by a head of `num_classes`."""
    if num_classes is None:
        return
    if val_index.num_classes is None or val_index.label_kind == "multi" or val_index.num_classes > num_classes:
        raise ConfigError(
            f"data.val={val_index.url} has {val_index.num_classes or 'no'} classes, the training data {num_classes}; "
            "pack both from one source with `pretrain data pack --val-fraction`, or leave data.val out"
        )
    known, asked = index.class_names, val_index.class_names
    if known and asked and asked != known[: len(asked)]:
        raise ConfigError(
            f"data.val={val_index.url} names its classes differently from the training data, so that label numbers "
            "do not mean the same; pack both from one source with `pretrain data pack --val-fraction`"
        )


def dataset_facts(index: DatasetIndex) -> dict[str, Any]:
    """What a checkpoint remembers of its data."""
    return {
        "url": index.url,
        "identity": index.identity,
        "num_samples": index.num_samples,
        "num_classes": index.num_classes,
        "class_names": None if index.class_names is None else list(index.class_names),
    }
