"""Re-read a whole dataset and compare it with its index.

Compares every shard's size and sha256, every chunk's crc32, the samples' keys and labels, and looks at
every image's header (--decode: decodes it). Names every difference; exit code 3 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import zlib
from collections.abc import Iterator

import numpy as np

from data_tools.index import describe
from data_tools.progress import Progress
from data_tools.scan import image_size
from data_tools.start import wrong_if_unreachable
from pretrain.data.decode import decode
from pretrain.data.framer import frame, image_of, label_of
from pretrain.data.index import DatasetIndex, SampleTable, open_index, open_samples
from pretrain.errors import DataError, ObjectNotFoundError
from pretrain.storage import Storage, open_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", metavar="URL", help="folder or s3://bucket/prefix with the shards and their index"
    )
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")


def run(args: argparse.Namespace) -> int:
    index = open_index(args.url)
    storage = open_storage(args.url)
    differences = 0
    with Progress(total=int(index.shard_bytes.sum()), what="verifying", unit="B") as progress:
        for difference in find_differences(storage, index, decode_images=args.decode, progress=progress):
            print(difference, flush=True)
            differences += 1
    if differences:
        raise DataError(
            f"{args.url}: {differences} difference{'s' * (differences > 1)} from the index; "
            "fetch or pack the named shards again"
        )
    print(f"{args.url}: all as the index says ({describe(index)})")
    return 0


def find_differences(
    storage: Storage, index: DatasetIndex, *, decode_images: bool, progress: Progress
) -> Iterator[str]:
    """One line for each way in which the stored bytes are not what the index says."""
    with wrong_if_unreachable():
        stored = {info.name: info.size for info in storage.list() if info.name.endswith(".tar")}
    for name in sorted(set(stored) - set(index.shard_names)):
        if "/" not in name:
            yield f"{name}: not in the index"
    samples: SampleTable | None = None
    try:
        samples = open_samples(index)
    except DataError as error:
        yield str(error)
    first_chunks = np.searchsorted(index.chunk_shard, np.arange(len(index.shard_names) + 1))
    first_samples = np.concatenate(([0], np.cumsum(index.chunk_samples)))
    for shard, name in enumerate(index.shard_names):
        size = int(index.shard_bytes[shard])
        if name not in stored:
            yield f"{name}: missing"
            progress.add(size)
            continue
        if stored[name] != size:
            yield f"{name}: {stored[name]} bytes, the index says {size}"
        try:
            yield from _shard_differences(
                storage,
                index,
                shard,
                chunks=range(first_chunks[shard], first_chunks[shard + 1]),
                first_samples=first_samples,
                samples=samples,
                decode_images=decode_images,
                progress=progress,
            )
        except ObjectNotFoundError:
            yield f"{name}: went away while it was read"


def _shard_differences(
    storage: Storage,
    index: DatasetIndex,
    shard: int,
    *,
    chunks: range,
    first_samples: np.ndarray,
    samples: SampleTable | None,
    decode_images: bool,
    progress: Progress,
) -> Iterator[str]:
    name = index.shard_names[shard]
    sha256 = hashlib.sha256()
    buffer = bytearray()  # the shard from offset `base` on, as far as it was read and is still needed
    base = 0
    blocks = storage.stream(name)

    def more() -> bool:
        block = next(blocks, None)
        if block is None:
            return False
        sha256.update(block)
        progress.add(len(block))
        buffer.extend(block)
        return True

    for chunk in chunks:
        offset, length = int(index.chunk_offset[chunk]), int(index.chunk_bytes[chunk])
        where = f"{name}, chunk {chunk} (bytes {offset} to {offset + length})"
        while base + len(buffer) < offset + length and more():
            pass
        del buffer[: offset - base]
        base = max(base, offset)
        data = bytes(buffer[:length])
        if len(data) < length:
            yield f"{where}: cut short, {len(data)} of {length} bytes are there"
            continue
        crc32 = zlib.crc32(data)
        if crc32 != index.chunk_crc32[chunk]:
            yield f"{where}: crc32 {crc32:08x}, the index says {int(index.chunk_crc32[chunk]):08x}"
        yield from _chunk_differences(
            data,
            where=where,
            count=int(index.chunk_samples[chunk]),
            first=int(first_samples[chunk]),
            samples=samples,
            decode_images=decode_images,
        )
    buffer.clear()
    while more():
        buffer.clear()
    if sha256.digest() != index.shard_sha256[shard].tobytes():
        want = index.shard_sha256[shard].tobytes().hex()
        yield f"{name}: sha256 {sha256.hexdigest()}, the index says {want}"


def _chunk_differences(
    data: bytes, *, where: str, count: int, first: int, samples: SampleTable | None, decode_images: bool
) -> Iterator[str]:
    try:
        frames = frame(data, where=where)
    except DataError as error:
        yield str(error)
        return
    if len(frames) != count:
        yield f"{where}: {len(frames)} samples, the index says {count}"
        return
    for row, sample in enumerate(frames):
        if samples is not None:
            key = samples.key(first + row)
            want = int(samples.labels[first + row])
            if sample.key != key:
                yield f"{where}: sample {row} is {sample.key!r}, the index says {key!r}"
            try:
                label = label_of(data, sample)
                if label != want:
                    yield f"{where}: {sample.key} has label {label}, the index says {want}"
            except DataError as error:
                yield f"{where}: {error}"
        image = image_of(sample)
        assert image is not None, "frame gave a sample without an image"
        suffix, offset, length = image
        if decode_images:
            try:
                decode(data[offset : offset + length], name=f"{sample.key}.{suffix}")
            except DataError as error:
                yield f"{where}: {error}"
        elif image_size(data[offset : offset + length]) is None:
            yield f"{where}: {sample.key}.{suffix} is neither JPEG, PNG nor WebP"
