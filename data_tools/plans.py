"""Decide which image goes into which shard. Called by pack.py.

A plan follows from the images and the options alone: every machine that packs a part makes the same one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from data_tools.image_files import ImageSet, Source
from pretrain.errors import UsageError
from pretrain.storage import join_url

PACK_VERSION = 2  # of what the bytes of a shard are for given images and options
TAR_OVERHEAD_BYTES = 512 + 1024 + 511  # a sample's second header, its label's blocks, padding at most
MEMBER_OVERHEAD_BYTES = 512 + 511  # a header and padding


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the bytes of a shard depend on, beside the images."""

    max_side: int | None
    shard_bytes: int
    chunk_samples: int | None
    seed: int
    skip_bad: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One dataset to write: which images in which shard. The digest says all that its bytes depend on.

    if_all_decode: the digest of what the bytes depend on when no image is bad. Then --skip-bad changes
    nothing, so that shards finished without it count when a bad one has made somebody give it.
    """

    url: str
    shards: list[list[Source]]
    class_names: list[str] | None
    num_classes: int | None
    options: Options
    digest: str
    if_all_decode: str


def make_plans(images: ImageSet, out: str, options: Options, val_fraction: float | None) -> list[Plan]:
    """One plan, or two for a training and a validation part."""
    if val_fraction is None:
        return [_make_plan(images.images, images, out, options)]
    # By key, and not by seed: an image stays on its side whatever is added or shuffled.
    parts: dict[str, list[Source]] = {"train": [], "val": []}
    for image in images.images:
        parts["val" if _hash(f"validation {image.key}") < val_fraction * 2**64 else "train"].append(image)
    for part, found in parts.items():
        if not found:
            raise UsageError(
                f"--val-fraction {val_fraction} leaves none of {len(images.images)} images for {part}; "
                "take another fraction"
            )
    return [_make_plan(found, images, join_url(out, part), options) for part, found in parts.items()]


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def _tar_bytes(image: Source) -> int:
    """About what a sample takes in a shard."""
    texts = [text for text in (image.caption, image.extra) if text is not None]
    return image.size + TAR_OVERHEAD_BYTES + sum(MEMBER_OVERHEAD_BYTES + len(text) for text in texts)


def _make_plan(part: list[Source], images: ImageSet, url: str, options: Options) -> Plan:
    shuffled = sorted(part, key=lambda image: (_hash(f"{options.seed} {image.key}"), image.key))
    shards: list[list[Source]] = []
    filled = options.shard_bytes
    for image in shuffled:
        needed = _tar_bytes(image)
        if filled + needed > options.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(image)
        filled += needed
    what = hashlib.sha256()
    settings = {**vars(options), "version": PACK_VERSION, "class_names": images.class_names}
    del settings["skip_bad"]
    what.update(json.dumps(settings, sort_keys=True).encode())
    for image in shuffled:
        facts = [image.key, image.suffix, image.label, image.size, image.labels, image.caption, image.extra]
        what.update(json.dumps(facts).encode())
    return Plan(
        url=url,
        shards=shards,
        class_names=images.class_names,
        num_classes=images.num_classes,
        options=options,
        digest=hashlib.sha256(f"{what.hexdigest()} {options.skip_bad}".encode()).hexdigest(),
        if_all_decode=what.hexdigest(),
    )


def shard_name(number: int) -> str:
    return f"{number:06d}.tar"
