"""A few images to hold an export against: the run's own where they can be reached, else textures.

Called by folder.py. Real images matter, because features of noise exercise little of a network.
"""

# B images, S side in pixels

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.data.augment import CENTER_FRACTION, DeviceTransform, EvalTransform
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.reader import ChunkReader
from pretrain.errors import PretrainError
from pretrain.formats.incoming import Source
from pretrain.models.spec import BackboneSpec
from pretrain.storage import S3Settings

COUNT = 4


@dataclass(frozen=True, kw_only=True)
class CheckImages:
    """images: float32 (B, 3, S, S), normalised. origin says in words where they are from.

    crop_fraction: what part of a larger image's side evaluation keeps, for this dataset.
    """

    images: Tensor
    origin: str
    crop_fraction: float


def images_for_check(spec: BackboneSpec, source: Source, *, url: str | None = None) -> CheckImages:
    """COUNT images spread over `url`, or over the run's validation or training set, or textures.

    Raises what reading `url` raises when it was given; the run's own datasets may be out of reach.
    """
    reasons = []
    data = source.config.get("data", {})
    s3 = source.s3
    for candidate in [url] if url else [data.get("val"), data.get("train")]:
        if candidate is None:
            continue
        try:
            index = open_index(candidate, s3=s3)
            pixels = _from_dataset(index, spec.image_size, s3)
        except (PretrainError, ImportError) as error:  # ImportError: no boto3, no bucket
            if url:
                raise
            reasons.append(f"{candidate}: {error}")
            continue
        fraction = crop_fraction(spec.image_size, index.image_side)
        return CheckImages(images=_normalise(pixels, spec), origin=candidate, crop_fraction=fraction)
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return CheckImages(
        images=_normalise(textures(COUNT, spec.image_size), spec),
        origin=f"generated textures{why}",
        crop_fraction=crop_fraction(spec.image_size, None),
    )


def crop_fraction(image_size: int, stored_side: int | None) -> float:
    """Evaluation keeps all of images that are no larger than the network's input."""
    return 1.0 if stored_side is not None and stored_side <= image_size else CENTER_FRACTION


def _from_dataset(index: DatasetIndex, image_size: int, s3: S3Settings) -> Tensor:
    """uint8 (B, 3, S, S), images spread over the dataset."""
    reader = ChunkReader(index, cache_dir=None, s3=s3)
    transform = EvalTransform(image_size=image_size)
    count = min(COUNT, index.num_samples)
    pixels = []
    try:
        for i in range(count):
            chunk = i * index.num_chunks // count
            row = i * int(index.chunk_samples[chunk]) // count
            sample = reader.read(chunk, row)
            pixels.append(transform(sample.image, name=sample.name).pixels)
    finally:
        reader.close()
    return torch.from_numpy(np.stack(pixels))


def textures(count: int, image_size: int) -> Tensor:
    """uint8 (count, 3, S, S): waves of many lengths and directions with discs over them, always the same."""
    random = np.random.Generator(np.random.Philox(key=image_size))
    y, x = np.mgrid[0:image_size, 0:image_size] / image_size
    pictures = np.full((count, 3, image_size, image_size), 128.0)
    for picture in pictures:
        for _ in range(8):
            angle, length, phase = (
                random.uniform(0, np.pi),
                0.04 * 25 ** random.uniform(),
                random.uniform(0, 6),
            )
            wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
            picture += random.uniform(-35, 35, (3, 1, 1)) * wave
        for _ in range(3):
            inside = (x - random.uniform()) ** 2 + (y - random.uniform()) ** 2 < random.uniform(
                0.05, 0.3
            ) ** 2
            picture[:, inside] = random.uniform(0, 255, (3, 1))
    return torch.from_numpy(pictures.clip(0, 255).astype(np.uint8))


def _normalise(pixels: Tensor, spec: BackboneSpec) -> Tensor:
    return DeviceTransform(mean=spec.mean, std=spec.std)(pixels)
