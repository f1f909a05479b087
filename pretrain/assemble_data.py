"""From a recipe to what a run learns from: its datasets, loader and augmentation.

Called by train.py, and by the commands that look at a run's samples.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.manifest import stored_lanes
from pretrain.checkpoint.skipped import read_skipped
from pretrain.config.schema import RunConfig
from pretrain.data.augment import DeviceTransform, TrainTransform
from pretrain.data.decode import resolve_decoder
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import INDEX_NAME, DatasetIndex, open_index
from pretrain.data.label_bits import is_multi_label
from pretrain.data.loader import TrainLoader
from pretrain.data.mixup import Mixing
from pretrain.data.rand_augment import RandAugment
from pretrain.data.reader import ChunkReader
from pretrain.datasets import RunData, first_datasets, newest_manifest, open_run_data
from pretrain.derived import (
    Split,
    cache_bytes,
    cache_dir,
    check_validation_labels,
    class_names_of,
    is_image_source,
    num_classes_for,
    run_lanes,
    s3_settings,
)
from pretrain.distributed import World, from_main, together
from pretrain.errors import DataError, UsageError


@dataclass(frozen=True, kw_only=True)
class Data(RunData):
    """What a run learns from: its datasets, the stream over them, the classes of the head."""

    val_index: DatasetIndex | None
    num_classes: int | None

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return class_names_of(self.indexes)


def open_data(config: RunConfig, *, world: World, debug: bool) -> Data:
    """The run's datasets. A folder or tar of images is packed into data.cache_dir first.

    All ranks together. Raises UsageError when there is nothing to train on, ConfigError when labels
    do not fit the recipe.
    """
    val_url, s3 = config.data.val, s3_settings(config)
    run_dir = Path(config.run_dir)
    lanes = from_main(world, lambda: stored_lanes(run_dir)) or run_lanes(config, debug=debug)
    manifest = from_main(world, lambda: newest_manifest(run_dir))
    urls = from_main(world, lambda: pack_images(config), patiently=True)
    opened = together(
        lambda: open_run_data(
            config,
            lanes=lanes,
            urls=urls,
            consumed=manifest.samples if manifest else 0,
            **first_datasets(config, manifest),
        )
    )
    num_classes = num_classes_for(config, opened.indexes[0])
    # What rank 0 has of it: all must jump over the same, also where each host has a folder of its own.
    opened = opened.skipping(from_main(world, lambda: read_skipped(run_dir)))
    val_index = together(lambda: open_index(val_url, s3=s3, cache_dir=cache_dir(config))) if val_url else None
    if val_index is not None:
        check_validation_labels(config, val_index, opened.indexes[0], num_classes)
    return Data(
        indexes=opened.indexes,
        gone=opened.gone,
        val_index=val_index,
        stream=opened.stream,
        segments=opened.segments,
        skipped=opened.skipped,
        num_classes=num_classes,
    )


def pack_images(config: RunConfig) -> dict[str, str]:
    """Where the shards of those sources are that hold images: packed, unless they were already."""
    images = [source.url for source in config.data.sources if is_image_source(source.url)]
    return {source: packed(source, config) for source in images}


def build_reader(config: RunConfig, index: DatasetIndex) -> ChunkReader:
    reader = ChunkReader(
        index,
        cache_dir=cache_dir(config),
        cache_bytes=cache_bytes(config),
        prefetch_bytes=config.data.prefetch_bytes,
        s3=s3_settings(config),
    )
    reader.store.prepare()
    return reader


def build_train_loader(
    config: RunConfig, data: Data, *, world: World, split: Split, workers: int
) -> TrainLoader:
    return TrainLoader(
        readers=[build_reader(config, index) for index in data.indexes],
        stream=data.stream,
        transform=TrainTransform(
            image_size=config.model.image_size,
            augmentation=config.data.augmentation,
            crop_scale=config.data.crop_scale,
            crop_ratio=config.data.crop_ratio,
            decoder=resolve_decoder(config.data.decoder),
            rand_augment=_rand_augment(config),
            erasing=config.data.erasing,
        ),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=split.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        workers=workers,
        prefetch_bytes=config.data.prefetch_bytes,
        worker_timeout_seconds=config.data.worker_timeout_seconds,
        pin_memory=world.device.type == "cuda",
        num_label_bits=num_label_bits(data, data.indexes),
    )


def num_label_bits(data: Data, indexes: Sequence[DatasetIndex]) -> int | None:
    """Classes of multi-label data that a loss looks at; None where a label is one number, or not looked at."""
    return data.num_classes if is_multi_label(indexes) else None


def _rand_augment(config: RunConfig) -> RandAugment | None:
    asked = config.data.rand_augment
    return RandAugment(ops=asked.ops, magnitude=asked.magnitude) if asked else None


def packed(source: str, config: RunConfig) -> str:
    """Where `source`'s shards are, made by `pretrain data pack` unless they are there already.

    The packing runs in a process of its own: data_tools is a neighbour, not a part. Raises UsageError,
    or DataError for an image that does not decode, when it fails.
    """
    out = cache_dir(config) / "packed" / f"{Path(source).stem}-{_listing_digest(Path(source))}"
    if not (out / INDEX_NAME).is_file():
        print(f"{source} holds images, not shards: packing them into {out}", file=sys.stderr)
        # The place is ours: what another version may have begun there is replaced.
        command = [sys.executable, "-m", "pretrain.cli", "data", "pack", source, str(out), "--overwrite"]
        code = subprocess.run(command).returncode
        if code:
            kind = DataError if code == DataError.exit_code else UsageError
            raise kind(f"{source} could not be packed; see above, or run `pretrain data pack` yourself")
    return str(out)


def _listing_digest(source: Path) -> str:
    """Of the path, and of its images' names, sizes and times: shards made of other images are not these."""
    below = source.rglob("*") if source.is_dir() else []
    images = [path for path in below if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.is_file()]
    digest = hashlib.sha256()
    for path in [source.resolve(), *sorted(images)]:
        status = path.stat()
        times = f"{status.st_size} {status.st_mtime_ns}" if path.is_file() else ""
        digest.update(os.fsencode(f"{path} {times}\0"))
    return digest.hexdigest()[:12]


def build_device_transform(config: RunConfig) -> DeviceTransform:
    return DeviceTransform(
        mean=config.data.mean,
        std=config.data.std,
        horizontal_flip=config.data.horizontal_flip,
        color_jitter=config.data.color_jitter,
        three_augment=config.data.three_augment,
        erases=config.data.erasing > 0,
    )


def build_mixing(config: RunConfig) -> Mixing | None:
    if not (config.data.mixup or config.data.cutmix):
        return None
    return Mixing(seed=config.seed, mixup=config.data.mixup, cutmix=config.data.cutmix)
