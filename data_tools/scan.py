"""Read one shard as a stream and say what the index needs to know about it. Called by index, pack and redact."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from pretrain.data.framer import cut_chunks, frame, image_of, labels_of
from pretrain.data.index import NO_LABEL, LabelSets, ShardEntry
from pretrain.data.keys import Keys
from pretrain.errors import DataError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(kw_only=True)
class Findings:
    """What is worth telling the user, gathered over shards: a count and the first case of each."""

    empty: int = 0  # tars without any sample
    first_empty: str = ""  # the tar's name
    without_image: int = 0
    first_without_image: str = ""  # "SHARD: KEY"
    scattered: int = 0  # of those, labels of a sample whose image lies elsewhere in the tar
    first_scattered: str = ""
    unlabelled: int = 0
    first_unlabelled: str = ""
    mislabelled: int = 0  # their text is no class
    first_mislabelled: str = ""  # and why not
    unreadable: int = 0
    first_unreadable: str = ""
    skipped: int = 0  # images that `pack --skip-bad` left out
    first_skipped: str = ""

    def note(self, kind: str, example: str, count: int = 1) -> None:
        if count:
            setattr(self, f"first_{kind}", getattr(self, f"first_{kind}") or example)
            setattr(self, kind, getattr(self, kind) + count)

    def add(self, other: Findings) -> None:
        for kind in (
            "empty",
            "without_image",
            "scattered",
            "unlabelled",
            "mislabelled",
            "unreadable",
            "skipped",
        ):
            self.note(kind, getattr(other, f"first_{kind}"), getattr(other, kind))


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) in pixels as the image's header says, or None if it has no header that we know."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # what Pillow raises for files that are no images, or damaged ones


class _Labels:
    """One label a sample, until a list of them comes."""

    def __init__(self) -> None:
        self.single: list[int] = []
        self._sets: list[tuple[int, ...]] | None = None

    def add(self, found: int | tuple[int, ...]) -> None:
        if isinstance(found, tuple):
            if self._sets is None:
                self._sets = [() if label == NO_LABEL else (label,) for label in self.single]
            self.single.append(0)
            self._sets.append(found)
        else:
            self.single.append(found)
            if self._sets is not None:
                self._sets.append(() if found == NO_LABEL else (found,))

    def sets(self) -> LabelSets | None:
        return None if self._sets is None else LabelSets.of(self._sets)


def scan_shard(
    blocks: Iterable[bytes],
    *,
    name: str,
    where: str,
    chunk_samples: int | None,
    findings: Findings,
    on_bytes: Callable[[int], None] | None = None,
) -> ShardEntry:
    """Frame, cut, hash and label a whole shard.

    Args:
        chunk_samples: samples a chunk; None cuts at about 8 MB.
        on_bytes: told the length of each block read.

    Raises:
        DataError: the tar is damaged or truncated. The message names `where`.
    """
    sha256 = hashlib.sha256()
    total = 0

    def watched() -> Iterator[bytes]:
        nonlocal total
        for block in blocks:
            sha256.update(block)
            total += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
            yield block

    limits = {} if chunk_samples is None else {"min_samples": chunk_samples, "max_samples": chunk_samples}
    columns: dict[str, list[int]] = {"offset": [], "bytes": [], "samples": [], "crc32": []}
    labels = _Labels()
    keys: list[str] = []
    labels_alone: list[str] = []

    def left_out(key: str, suffixes: set[str]) -> None:
        findings.note("without_image", f"{name}: {key}")
        if not suffixes.isdisjoint(("cls", "json")):
            labels_alone.append(key)

    side = captions = 0
    for chunk in cut_chunks(
        watched(),
        where=where,
        on_left_out=left_out,
        **limits,
    ):
        frames = frame(chunk.data, where=f"{where}, chunk at byte {chunk.offset}")
        view = memoryview(chunk.data)
        for sample in frames:
            try:
                labels.add(labels_of(chunk.data, sample))
            except DataError as error:  # no harm where a table says what they are
                findings.note("mislabelled", f"{name}: {error}")
                labels.add(NO_LABEL)
            keys.append(sample.key)
            captions += "txt" in sample.members
            image = image_of(sample)
            assert image is not None, "frame gave a sample without an image"
            size = image_size(view[image[1] : image[1] + image[2]])
            if size is None:
                findings.note("unreadable", f"{name}: {sample.key}.{image[0]}")
            else:
                side = max(side, *size)
        columns["offset"].append(chunk.offset)
        columns["bytes"].append(len(chunk.data))
        columns["samples"].append(len(frames))
        columns["crc32"].append(zlib.crc32(chunk.data))
    sampled = set(keys) if labels_alone else set()
    for key in labels_alone:
        if key in sampled:
            findings.note("scattered", f"{name}: {key!r}")
    return ShardEntry(
        name=name,
        num_bytes=total,
        sha256=sha256.digest(),
        chunk_offset=columns["offset"],
        chunk_bytes=columns["bytes"],
        chunk_samples=columns["samples"],
        chunk_crc32=columns["crc32"],
        labels=labels.single,
        keys=Keys.of(keys),
        image_side=side or None,
        label_sets=labels.sets(),
        num_captions=captions,
    )
