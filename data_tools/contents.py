"""What an index says, shard by shard. Called by verify, stats, redact and sync, and in their workers."""

from __future__ import annotations

import functools

import numpy as np

from pretrain.data.index import DatasetIndex, LabelSets, SampleTable, ShardEntry, open_index, open_samples
from pretrain.data.index_cache import default_cache_dir
from pretrain.errors import DataError


@functools.lru_cache(maxsize=4)
def opened(url: str, identity: str) -> tuple[DatasetIndex, SampleTable | None]:
    """A dataset that a worker works on, kept open from task to task. No table where it is missing or damaged.

    Raises:
        DataError: the dataset is no longer the one of that identity.
    """
    index = open_index(url, cache_dir=default_cache_dir())
    if index.identity != identity:
        raise DataError(f"{url}: its index was replaced meanwhile; run the command again")
    try:
        return index, open_samples(index, cache_dir=default_cache_dir())
    except DataError:
        return index, None


class Layout:
    """Where shards begin in an index's columns: chunk and sample numbers."""

    def __init__(self, index: DatasetIndex) -> None:
        count = len(index.shard_names)
        self.first_chunk = np.searchsorted(index.chunk_shard, np.arange(count + 1))
        self.first_sample = np.concatenate(([0], np.cumsum(index.shard_samples)))

    def chunks(self, shard: int) -> range:
        return range(int(self.first_chunk[shard]), int(self.first_chunk[shard + 1]))

    def samples(self, shard: int) -> range:
        return range(int(self.first_sample[shard]), int(self.first_sample[shard + 1]))

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """int64[n]: the shard of each sample number."""
        return np.searchsorted(self.first_sample, samples, side="right") - 1


def entry_of(index: DatasetIndex, samples: SampleTable, layout: Layout, shard: int) -> ShardEntry:
    """What the index and its table say of one shard, as it went into them."""
    chunks, mine = layout.chunks(shard), layout.samples(shard)
    part = slice(chunks.start, chunks.stop)
    sets, labels = None, samples.labels[mine.start : mine.stop]
    if samples.label_offsets is not None and samples.label_values is not None:
        ends = samples.label_offsets[mine.start : mine.stop + 1]
        sets = LabelSets(offsets=ends - ends[0], values=samples.label_values[int(ends[0]) : int(ends[-1])])
        labels = np.zeros(len(mine), np.int64)  # -1 would say that they have none
    return ShardEntry(
        name=index.shard_names[shard],
        num_bytes=int(index.shard_bytes[shard]),
        sha256=index.shard_sha256[shard].tobytes(),
        chunk_offset=index.chunk_offset[part],
        chunk_bytes=index.chunk_bytes[part],
        chunk_samples=index.chunk_samples[part],
        chunk_crc32=index.chunk_crc32[part],
        labels=labels,
        keys=samples.keys.slice(mine.start, mine.stop),
        image_side=int(index.shard_side[shard]) or None,
        label_sets=sets,
        num_captions=int(index.shard_captions[shard]),
    )
