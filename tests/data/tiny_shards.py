"""Small datasets for tests of the data path: written by webdataset, indexed by the project's own builder."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pretrain.data.framer import cut_chunks, frame, label_of
from pretrain.data.index import DatasetIndex, IndexBuilder, ShardEntry, open_index, write_index
from pretrain.storage import open_storage


def jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A JPEG of (width, height), of its own smooth colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_dataset(
    folder: Path,
    *,
    count: int,
    per_shard: int = 20,
    chunk_samples: int = 4,
    image: Callable[[int], bytes] = jpeg,
    labels: bool = True,
    suffix: str = "jpg",
) -> DatasetIndex:
    """`count` samples with keys "s00000", … and label i % 10, in indexed shards under `folder`."""
    folder.mkdir(parents=True)
    for shard, first in enumerate(range(0, count, per_shard)):
        with webdataset.TarWriter(str(folder / f"shard-{shard:04d}.tar")) as writer:
            for i in range(first, min(first + per_shard, count)):
                label = {"cls": str(i % 10).encode()} if labels else {}
                writer.write({"__key__": f"s{i:05d}", suffix: image(i), **label})
    return index_folder(folder, chunk_samples=chunk_samples)


def index_folder(folder: Path, *, chunk_samples: int) -> DatasetIndex:
    builder = IndexBuilder()
    for path in sorted(folder.glob("*.tar")):
        data = path.read_bytes()
        chunks = list(
            cut_chunks([data], where=path.name, min_samples=chunk_samples, max_samples=chunk_samples)
        )
        frames = [frame(chunk.data, where=path.name) for chunk in chunks]
        builder.add_shard(
            ShardEntry(
                name=path.name,
                num_bytes=len(data),
                sha256=hashlib.sha256(data).digest(),
                chunk_offset=[chunk.offset for chunk in chunks],
                chunk_bytes=[len(chunk.data) for chunk in chunks],
                chunk_samples=[len(found) for found in frames],
                chunk_crc32=[zlib.crc32(chunk.data) for chunk in chunks],
                labels=[label_of(c.data, s) for c, found in zip(chunks, frames, strict=True) for s in found],
                keys=[s.key for found in frames for s in found],
            )
        )
    _, index_file, samples_file = builder.finish(str(folder))
    write_index(open_storage(str(folder)), index_file, samples_file)
    return open_index(str(folder))
