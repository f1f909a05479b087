"""The labels of multi-label samples in their compact form: a bit a class. Called by source.py.

They are made in the trainer's process, from the index's samples file, where it knows which sample stands at
each position: workers decode images and need not know. 21,843 classes are 2.7 kB a sample, next to 150 kB of
pixels, and of one size whatever a sample has, which lists of labels are not.
"""

# n samples, K classes, E = ceil(K / 8) bytes of a sample's labels, V labels of all samples together

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pretrain.data.index import DatasetIndex, SampleTable, open_samples
from pretrain.data.order import Int64s
from pretrain.data.reader import ChunkReader
from pretrain.errors import DataError

Bytes = npt.NDArray[np.uint8]


def pack_label_sets(counts: Int64s, values: npt.NDArray[np.integer], *, num_classes: int) -> Bytes:
    """Bits uint8 (n, E), the lowest of a byte first, of samples that have counts[i] of the V `values` each.

    Raises DataError for a label outside 0 … num_classes-1.
    """
    bits = np.zeros((len(counts), -(-num_classes // 8)), np.uint8)
    wrong = (values < 0) | (values >= num_classes)
    if wrong.any():
        raise DataError(
            f"label {int(values[wrong][0])} where labels 0 to {num_classes - 1} are expected; see `pretrain data "
            "stats` for the dataset's labels, or set objective.num_classes"
        )
    rows = np.repeat(np.arange(len(counts)), counts)
    np.bitwise_or.at(bits, (rows, values >> 3), np.left_shift(1, values & 7).astype(np.uint8))
    return bits


def unpack_label_set(bits: npt.NDArray[np.uint8]) -> tuple[int, ...]:
    """The labels in one sample's bits uint8 (E,)."""
    return tuple(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


def is_multi_label(indexes: Sequence[DatasetIndex]) -> bool:
    """Has one of a run's datasets any number of labels a sample? All of its batches then carry label bits."""
    return any(index.label_kind == "multi" for index in indexes)


class LabelBits:
    """The label bits of samples by their place; of single-label datasets in a mixture, one bit each.

    The samples files are opened when first asked for.
    """

    def __init__(self, readers: Sequence[ChunkReader], *, num_classes: int) -> None:
        self.num_classes = num_classes
        self._readers = readers
        self._tables: dict[int, tuple[SampleTable, Int64s]] = {}

    @property
    def num_bytes(self) -> int:
        """Of one sample."""
        return -(-self.num_classes // 8)

    def of(self, datasets: Int64s, chunks: Int64s, rows: Int64s) -> Bytes:
        """uint8 (n, E). Raises what opening the samples file raises, and DataError as `pack_label_sets`."""
        bits = np.zeros((len(rows), self.num_bytes), np.uint8)
        for dataset in np.unique(datasets).tolist():
            here = np.flatnonzero(datasets == dataset)
            table, starts = self._table(dataset)
            bits[here] = self._of_table(table, starts[chunks[here]] + rows[here])
        return bits

    def _of_table(self, table: SampleTable, samples: Int64s) -> Bytes:
        if table.label_offsets is None or table.label_values is None:
            labels = table.labels[samples].astype(np.int64)
            return pack_label_sets(np.ones(len(samples), np.int64), labels, num_classes=self.num_classes)
        begins = table.label_offsets[samples].astype(np.int64)
        counts = table.label_offsets[samples + 1].astype(np.int64) - begins
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        values = table.label_values[np.repeat(begins, counts) + within].astype(np.int64)
        return pack_label_sets(counts, values, num_classes=self.num_classes)

    def _table(self, dataset: int) -> tuple[SampleTable, Int64s]:
        if dataset not in self._tables:
            reader = self._readers[dataset]
            samples = open_samples(reader.index, s3=reader.s3, cache_dir=reader.cache_dir)
            ends = np.cumsum(reader.index.chunk_samples, dtype=np.int64)
            self._tables[dataset] = samples, ends - reader.index.chunk_samples
        return self._tables[dataset]
