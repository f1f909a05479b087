"""Make an index from what was found in each shard. Called by the data tools.

Columns are spooled to a temporary folder as shards come and streamed out at the end: memory is one
shard's worth, whatever the dataset's size, and putting parts together is concatenation.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.columns import Column, write_columns
from pretrain.data.index_format import (
    COLUMNS,
    INDEX_NAME,
    INDEX_VERSION,
    NO_LABEL,
    SAMPLES_NAME,
    DatasetIndex,
    parse_index,
    write_index_file,
)
from pretrain.data.keys import Keys
from pretrain.errors import DataError, UsageError
from pretrain.storage import Storage

_BLOCK_ROWS = 1 << 20
_HIGHEST_LABEL = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class LabelSets:
    """Any number of labels a sample: sample i has `values[offsets[i]:offsets[i + 1]]`."""

    offsets: npt.NDArray[np.int64]  # [n + 1]
    values: npt.NDArray[np.int32]

    @classmethod
    def of(cls, sets: Sequence[Sequence[int]]) -> LabelSets:
        offsets = np.zeros(len(sets) + 1, np.int64)
        np.cumsum([len(labels) for labels in sets], out=offsets[1:])
        return cls(offsets=offsets, values=np.array([one for labels in sets for one in labels], np.int32))

    def take(self, rows: npt.NDArray[np.int64]) -> LabelSets:
        counts = np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        at = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], counts)
        return LabelSets(offsets=offsets, values=self.values[at])


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the index says about one shard. Chunk and sample columns are in storage order.

    label_sets: where any sample has a list of labels; `labels` then tells with -1 which have none at all
    and with any other number which have (perhaps empty) sets.
    """

    name: str
    num_bytes: int
    sha256: bytes
    chunk_offset: Sequence[int] | np.ndarray
    chunk_bytes: Sequence[int] | np.ndarray
    chunk_samples: Sequence[int] | np.ndarray
    chunk_crc32: Sequence[int] | np.ndarray
    labels: Sequence[int] | np.ndarray
    keys: Sequence[str] | Keys
    image_side: int | None = None
    label_sets: LabelSets | None = None
    num_captions: int = 0


class _Spool:
    """A column that grows in a file."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, tail: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.tail, self.rows = path, np.dtype(dtype), tail, 0
        self._file = open(path, "wb")  # noqa: SIM115 - until `close`
        self._digest = hashlib.sha256()

    def append(self, values: npt.ArrayLike) -> None:
        array = np.ascontiguousarray(values, self.dtype)
        assert array.shape[1:] == self.tail, f"{self.path.name}: {array.shape}"
        self.rows += len(array)
        if array.size:
            data = array.reshape(-1).view(np.uint8).data
            self._digest.update(data)
            self._file.write(data)

    def close(self) -> Column:
        self._file.close()
        return Column(self.dtype, (self.rows, *self.tail), self.path)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class IndexBuilder:
    """Collects shards in order and writes the two files, which live as long as the builder does."""

    def __init__(
        self,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        plan: str | None = None,
        labels_overridden: bool = False,
        samples_name: str = SAMPLES_NAME,
        revision: int = 0,
        chunk_rule: int | None = None,
    ) -> None:
        """`num_classes` is for labels without names; None counts up to the highest label seen."""
        self._class_names = None if class_names is None else list(class_names)
        self._num_classes = num_classes
        self._properties: dict[str, Any] = {
            "plan": plan,
            "labels_overridden": labels_overridden,
            "samples_name": samples_name,
            "revision": revision,
            "chunk_rule": chunk_rule,
        }
        self._folder = Path(tempfile.mkdtemp(prefix="pretrain-index-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._columns = {
            name: _Spool(self._folder / name, dtype, tail) for name, (dtype, tail) in COLUMNS.items()
        }
        self._keys = _Spool(self._folder / "key_bytes", np.uint8)
        self._key_offsets = _Spool(self._folder / "key_offsets", np.int64)
        self._key_offsets.append([0])
        self._labels: _Spool | None = _Spool(self._folder / "labels", np.int32)
        self._label_offsets: _Spool | None = None  # since a shard with lists of labels came
        self._label_values: _Spool | None = None
        self._names: list[str] = []
        self._key_end = self._label_end = self._samples = self._missing = self._captions = self._side = 0
        self._highest = NO_LABEL
        self._last_label, self._sorted = NO_LABEL, True

    def add_shard(self, entry: ShardEntry) -> None:
        keys = entry.keys if isinstance(entry.keys, Keys) else Keys.of(entry.keys)
        labels = np.asarray(entry.labels)
        count = len(labels)
        assert int(np.sum(entry.chunk_samples)) == count == len(keys), "chunk counts and labels differ"
        columns = self._columns
        columns["shard_bytes"].append([entry.num_bytes])
        columns["shard_samples"].append([count])
        columns["shard_sha256"].append(np.frombuffer(entry.sha256, np.uint8)[None])
        columns["shard_captions"].append([entry.num_captions])
        columns["shard_side"].append([entry.image_side or 0])
        columns["chunk_shard"].append(np.full(len(entry.chunk_offset), len(self._names)))
        for name in ("chunk_offset", "chunk_bytes", "chunk_samples", "chunk_crc32"):
            columns[name].append(getattr(entry, name))
        self._names.append(entry.name)
        self._keys.append(keys.data)
        self._key_offsets.append(keys.offsets[1:] + self._key_end)
        self._key_end += int(keys.offsets[-1])
        self._samples += count
        self._captions += entry.num_captions
        self._side = max(self._side, entry.image_side or 0)
        self._add_labels(labels, entry.label_sets, entry.name)

    def _add_labels(self, labels: np.ndarray, sets: LabelSets | None, shard: str) -> None:
        self._missing += int((labels == NO_LABEL).sum())
        values = labels if sets is None else sets.values
        highest = int(values.max(initial=NO_LABEL))
        if highest > _HIGHEST_LABEL:
            raise DataError(f"{shard}: label {highest} is above {_HIGHEST_LABEL}; number classes from 0")
        self._highest = max(self._highest, highest)
        if sets is not None and self._labels is not None:
            self._go_multi()
        if self._labels is not None:
            self._sorted &= bool(np.all(np.diff(labels, prepend=self._last_label) >= 0))
            self._last_label = int(labels[-1]) if len(labels) else self._last_label
            self._labels.append(labels)
            return
        if sets is None:
            has_one = labels != NO_LABEL
            sets = LabelSets(
                offsets=np.concatenate(([0], np.cumsum(has_one))), values=labels[has_one].astype(np.int32)
            )
        assert self._label_offsets is not None, "since the first list of labels"
        assert self._label_values is not None, "likewise"
        self._label_offsets.append(sets.offsets[1:] + self._label_end)
        self._label_values.append(sets.values)
        self._label_end += int(sets.offsets[-1])

    def _go_multi(self) -> None:
        """The first list of labels has come: what was one label a sample becomes lists of one."""
        assert self._labels is not None
        former, self._labels = self._labels.close(), None
        self._label_offsets = _Spool(self._folder / "label_offsets", np.int64)
        self._label_values = _Spool(self._folder / "label_values", np.int32)
        self._label_offsets.append([0])
        assert isinstance(former.content, Path)
        with open(former.content, "rb") as file:
            while block := file.read(4 * _BLOCK_ROWS):
                self._add_labels(np.frombuffer(block, np.int32), None, "")
                self._missing -= int((np.frombuffer(block, np.int32) == NO_LABEL).sum())  # counted before
        former.content.unlink()

    def finish(self, url: str) -> tuple[DatasetIndex, Path, Path]:
        """(the index, a file with INDEX_NAME's content, one with SAMPLES_NAME's). Once.

        Raises:
            UsageError: no sample was added.
            DataError: a label has no class name, or only some samples have labels.
        """
        if not self._samples:
            raise UsageError(f"{url}: no samples found; nothing was indexed")
        num_classes = self._count_classes(url)
        samples = {"key_offsets": self._key_offsets.close(), "key_bytes": self._keys.close()}
        if self._labels is None:
            assert self._label_offsets is not None, "since the first list of labels"
            assert self._label_values is not None, "likewise"
            kind = "multi"
            samples["label_offsets"] = self._label_offsets.close()
            samples["label_values"] = self._label_values.close()
        else:
            kind = "none" if num_classes is None else "single"
            labels = self._labels.close()
            if kind == "single":
                samples["labels"] = labels
        samples_path, index_path = self._folder / "samples.finished", self._folder / "index.finished"
        with open(samples_path, "wb") as file:
            samples_sha256 = write_columns(file, samples, {"version": INDEX_VERSION})
        write_index_file(
            index_path,
            shard_names=self._names,
            columns={name: spool.close() for name, spool in self._columns.items()},
            digests={name: spool.hexdigest() for name, spool in self._columns.items()},
            properties={
                **self._properties,
                "num_samples": self._samples,
                "class_names": self._class_names,
                "num_classes": num_classes,
                "image_side": self._side or None,
                "label_kind": kind,
                "labels_sorted": kind == "single" and num_classes != 1 and self._sorted,
                "num_captions": self._captions,
                "samples_sha256": samples_sha256,
            },
        )
        return parse_index(url, np.memmap(index_path, np.uint8, "r")), index_path, samples_path

    def _count_classes(self, url: str) -> int | None:
        if self._missing == self._samples:
            if self._class_names is not None:
                raise DataError(f"{url}: class names were given, but no sample has a label")
            return None
        if self._missing:
            raise DataError(
                f"{url}: {self._missing} of {self._samples} samples have no label; label all of them or none"
            )
        count = self._num_classes if self._class_names is None else len(self._class_names)
        if count is not None and self._highest >= count:
            raise DataError(
                f"{url}: label {self._highest} is out of range, there are {count} classes; "
                "give the names of all classes, in order of their labels"
            )
        return self._highest + 1 if count is None else count


def write_index(
    storage: Storage,
    index_file: bytes | Path,
    samples_file: bytes | Path,
    *,
    samples_name: str = SAMPLES_NAME,
) -> None:
    """Put both files, the index last: a dataset with an index is whole."""
    storage.put(samples_name, samples_file)
    storage.put(INDEX_NAME, index_file)
