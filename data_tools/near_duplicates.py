"""Find images of a validation set that the training set holds too, or nearly. Called by stats.py.

Every image of both is decoded and hashed perceptually (pHash: 64 signs of the low frequencies of its cosine
transform, by the ImageHash library). Two that differ in few of the 64 bits look alike: rescaled, compressed
again, slightly recoloured; not turned, mirrored or cut. Single-coloured images all look alike to it, and are
left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.contents import Layout, opened
from data_tools.parallel import processes_for, report, run_tasks, task_storage
from data_tools.progress import Progress
from pretrain.data.decode import decode
from pretrain.data.framer import frame, image_of
from pretrain.data.index import DatasetIndex
from pretrain.errors import DataError, UsageError

BITS = 64
_TASK_BYTES = 64 << 20
_FLAT = 4.0  # standard deviation in levels below which an image has no content to compare
_BLOCK_PAIRS = 1 << 22


class Hashes(NamedTuple):
    """Perceptual hashes of n samples; others of the dataset did not decode, or are single-coloured."""

    values: npt.NDArray[np.uint64]  # [n]
    samples: npt.NDArray[np.int64]  # [n], sample numbers
    undecodable: int
    flat: int


class Pairs(NamedTuple):
    """Places in two lists of hashes that are alike, and in how many bits they differ."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    distance: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class HashTask:
    """Consecutive chunks of a dataset."""

    url: str
    identity: str
    first_chunk: int
    end_chunk: int


def check_library() -> None:
    """UsageError, saying how to get it, without the library."""
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--near-duplicates needs ImageHash, which is not installed; "
            "run `pip install 'vit-pretrain[duplicates]'`"
        ) from error


def hash_dataset(index: DatasetIndex, *, processes: int | None) -> Hashes:
    """Decode and hash all images of a dataset, in processes."""
    tasks = list(_tasks(index))
    used = processes_for(processes, tasks=len(tasks), total_bytes=int(index.shard_bytes.sum()))
    with Progress(total=index.num_samples, what=f"hashing {index.url}", unit="images") as progress:
        found = list(
            run_tasks(
                hash_chunks,
                tasks,
                processes=used,
                progress=progress,
                preload=("imagehash", "data_tools.near_duplicates"),
            )
        )
    samples = np.concatenate([part.samples for part in found])
    order = np.argsort(samples)
    return Hashes(
        values=np.concatenate([part.values for part in found])[order],
        samples=samples[order],
        undecodable=sum(part.undecodable for part in found),
        flat=sum(part.flat for part in found),
    )


def _tasks(index: DatasetIndex) -> Iterator[HashTask]:
    ends = np.cumsum(index.chunk_bytes)
    first = 0
    while first < index.num_chunks:
        done = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, done + _TASK_BYTES, side="right")))
        yield HashTask(url=index.url, identity=index.identity, first_chunk=first, end_chunk=end)
        first = end


def hash_chunks(task: HashTask) -> Hashes:
    """Hash the images of a task. Reports images."""
    import imagehash

    index, _ = opened(task.url, task.identity)
    storage = task_storage(task.url)
    number = int(index.chunk_samples[: task.first_chunk].sum(dtype=np.int64))
    values, samples, undecodable, flat = [], [], 0, 0
    for chunk in range(task.first_chunk, task.end_chunk):
        name = index.shard_names[int(index.chunk_shard[chunk])]
        data = storage.read(name, int(index.chunk_offset[chunk]), int(index.chunk_bytes[chunk]))
        for sample in frame(data, where=f"{name}, chunk {chunk}"):
            image = image_of(sample)
            assert image is not None, "frame gave a sample without an image"
            try:
                pixels = decode(data[image[1] : image[1] + image[2]], name=sample.key)
            except DataError:
                undecodable += 1
            else:
                if np.asarray(pixels.convert("L")).std() < _FLAT:
                    flat += 1
                else:
                    bits = np.packbits(imagehash.phash(pixels).hash.reshape(-1))
                    values.append(bits.view(">u8")[0])
                    samples.append(number)
            number += 1
            report(1)
    return Hashes(np.array(values, np.uint64), np.array(samples, np.int64), undecodable, flat)


def alike(first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], *, distance: int) -> Pairs:
    """All pairs that differ in at most `distance` bits.

    The bits are cut into one band more than may differ: of a pair that is alike one band is equal (the
    pigeonhole principle), so only such pairs are compared.
    """
    bounds = np.linspace(0, BITS, distance + 2).round().astype(int)
    found: list[npt.NDArray[np.int64]] = [np.zeros((0, 3), np.int64)]
    for low, high in pairwise(bounds.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        bands = [(values >> np.uint64(low)) & mask for values in (first, second)]
        order = np.argsort(bands[1], kind="stable")
        ordered = bands[1][order]
        start = np.searchsorted(ordered, bands[0], side="left")
        counts = np.searchsorted(ordered, bands[0], side="right") - start
        ends = np.cumsum(counts)
        row = 0
        while row < len(first):  # in blocks of a bounded number of pairs
            before = int(ends[row - 1]) if row else 0
            stop = max(row + 1, int(np.searchsorted(ends, before + _BLOCK_PAIRS, side="right")))
            left = np.repeat(np.arange(row, stop), counts[row:stop])
            within = (
                np.arange(len(left)) + before - np.repeat(ends[row:stop] - counts[row:stop], counts[row:stop])
            )
            right = order[start[left] + within]
            differing = _bits_set(first[left] ^ second[right])
            near = differing <= distance
            found.append(np.stack((left[near], right[near], differing[near]), axis=1))
            row = stop
    unique = np.unique(np.concatenate(found), axis=0)
    return Pairs(unique[:, 0], unique[:, 1], unique[:, 2])


def _bits_set(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    counts = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
    return counts.astype(np.int64)


def shard_names_of(index: DatasetIndex, samples: npt.NDArray[np.int64]) -> list[str]:
    return [index.shard_names[shard] for shard in Layout(index).shards_of(samples).tolist()]
