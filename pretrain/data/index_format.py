"""What an index says, and how its two files hold it. Called by index.py, which opens them, and index_builder.py.

`index.safetensors` holds a column for each property of shards and chunks; the samples file holds each
sample's label and key. The identity is a hash over all columns and properties: two datasets with one
identity hold the same bytes in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.columns import HOW_TO_MEND, Column, array_digest, column_of, parse_columns, write_columns
from pretrain.data.keys import KeyFinder, Keys
from pretrain.errors import DataError, UsageError
from pretrain.storage import join_url

INDEX_NAME = "index.safetensors"
SAMPLES_NAME = "samples.safetensors"  # of a dataset that was never redacted; the index says which it is
INDEX_VERSION = 2
NO_LABEL = -1

COLUMNS = {  # name -> (dtype, shape after the first axis)
    "shard_bytes": (np.int64, ()),
    "shard_samples": (np.int64, ()),
    "shard_sha256": (np.uint8, (32,)),
    "shard_captions": (np.int64, ()),
    "shard_side": (np.int32, ()),
    "chunk_shard": (np.int32, ()),
    "chunk_offset": (np.int64, ()),
    "chunk_bytes": (np.int64, ()),
    "chunk_samples": (np.int32, ()),
    "chunk_crc32": (np.uint32, ()),
}
_NOTHING = type(None)
_IDENTIFYING: dict[str, tuple[type, ...]] = {  # properties that the identity covers, and what they may be
    "num_samples": (int,),
    "class_names": (list, tuple, _NOTHING),
    "num_classes": (int, _NOTHING),
    "image_side": (int, _NOTHING),
    "label_kind": (str,),
    "labels_sorted": (bool,),
    "labels_overridden": (bool,),
    "num_captions": (int,),
    "samples_sha256": (str,),
}
_OTHERS: dict[str, tuple[type, ...]] = {
    "plan": (str, _NOTHING),
    "samples_name": (str,),
    "revision": (int,),
    "chunk_rule": (int, _NOTHING),
}


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """S shards, M chunks, N samples. Arrays are read-only and may be mapped from the file.

    label_kind: "none", "single", or "multi" (a sample has any number of labels). labels_overridden: they
    came from a table, and what the tars say is not to be used. plan: digest of what `pretrain data pack` was
    asked to make. revision: how often the dataset was redacted. chunk_rule: samples a chunk as asked for;
    None: about 8 MB.
    """

    url: str
    identity: str  # sha256 hex
    num_samples: int
    shard_names: tuple[str, ...]
    shard_bytes: np.ndarray  # int64[S]
    shard_samples: np.ndarray  # int64[S]
    shard_sha256: np.ndarray  # uint8[S, 32]
    shard_captions: np.ndarray  # int64[S], samples with a caption
    shard_side: np.ndarray  # int32[S], largest stored side in pixels, 0 for unknown
    chunk_shard: np.ndarray  # int32[M]
    chunk_offset: np.ndarray  # int64[M], bytes from the shard's start
    chunk_bytes: np.ndarray  # int64[M]
    chunk_samples: np.ndarray  # int32[M]
    chunk_crc32: np.ndarray  # uint32[M]
    class_names: tuple[str, ...] | None
    num_classes: int | None  # None: unlabelled
    image_side: int | None  # largest stored side, pixels
    labels_sorted: bool
    samples_sha256: str
    label_kind: str = "none"
    labels_overridden: bool = False
    num_captions: int = 0
    plan: str | None = None
    samples_name: str = SAMPLES_NAME
    revision: int = 0
    chunk_rule: int | None = None

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_shard)


class Found(NamedTuple):
    """Samples that carry the keys looked for. `which` says, for each, the key's place in the list given."""

    samples: npt.NDArray[np.int64]  # [n], ascending
    which: npt.NDArray[np.int64]  # [n]
    unknown: list[str]  # keys that no sample carries


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """Label and key of every sample, in storage order.

    `labels` is -1 for samples without one, and for all of a multi-label dataset, whose sample i has
    `label_values[label_offsets[i]:label_offsets[i + 1]]`.
    """

    labels: np.ndarray  # int32[N]
    keys: Keys
    label_offsets: np.ndarray | None = None  # int64[N + 1]
    label_values: np.ndarray | None = None  # int32[...]

    def key(self, i: int) -> str:
        return self.keys[i]

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def label_set(self, i: int) -> tuple[int, ...]:
        """All labels of sample i."""
        if self.label_offsets is None or self.label_values is None:
            return () if self.labels[i] == NO_LABEL else (int(self.labels[i]),)
        start, end = int(self.label_offsets[i]), int(self.label_offsets[i + 1])
        return tuple(self.label_values[start:end].tolist())

    def find(self, keys: Sequence[str]) -> Found:
        """All samples that carry one of `keys` (one may be carried by several). Memory: the keys, and a block."""
        samples, which = KeyFinder(Keys.of(keys)).search(self.keys)
        seen = np.zeros(len(keys), bool)
        seen[which] = True
        return Found(samples, which, [keys[i] for i in np.flatnonzero(~seen).tolist()])


def _names_blob(names: Sequence[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(list(names)).encode(), np.uint8)


def identity_of(properties: dict[str, Any], digests: dict[str, str]) -> str:
    """Hash of all columns and properties; not of the URL, which a copy changes, or of the plan."""
    covered = {name: properties[name] for name in _IDENTIFYING}
    text = json.dumps({"version": INDEX_VERSION, **covered, "columns": digests}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_index_file(
    path: Path,
    *,
    shard_names: Sequence[str],
    columns: dict[str, Column],
    digests: dict[str, str],
    properties: dict[str, Any],
) -> None:
    """Write INDEX_NAME's content. `digests` are those of `columns`; `properties` all but the arrays and names."""
    names = _names_blob(shard_names)
    digests = {**digests, "shard_names": array_digest(names)}
    metadata = {
        "version": INDEX_VERSION,
        "identity": identity_of(properties, digests),
        **{name: properties[name] for name in (*_IDENTIFYING, *_OTHERS)},
    }
    with open(path, "wb") as file:
        write_columns(file, {**columns, "shard_names": column_of(names)}, metadata)


def parse_index(url: str, buffer: np.ndarray) -> DatasetIndex:
    """The index in INDEX_NAME's bytes, checked against its own hash.

    Raises:
        UsageError: another version, or no samples. DataError: damaged.
    """
    where = join_url(url, INDEX_NAME)
    arrays, metadata = parse_columns(buffer, where=where)
    version = metadata.get("version")
    if version != INDEX_VERSION:
        raise UsageError(
            f"{where}: index version {version}, this program reads {INDEX_VERSION}; "
            f"make it again with `pretrain data index {url} --overwrite`"
        )
    try:
        digests = {name: array_digest(arrays[name]) for name in (*COLUMNS, "shard_names")}
        got = identity_of(metadata, digests)
        properties = {name: metadata[name] for name in (*_IDENTIFYING, *_OTHERS, "identity")}
        for name, types in (*_IDENTIFYING.items(), *_OTHERS.items()):
            if type(properties[name]) not in types:  # not isinstance: True is no number of samples
                raise ValueError(f"{name} is {str(properties[name])[:40]}")
        strings = [*(properties["class_names"] or ()), *json.loads(arrays["shard_names"].tobytes())]
        if not all(isinstance(text, str) for text in strings):
            raise ValueError("a name is no text")
        if properties["class_names"] is not None:
            properties["class_names"] = tuple(properties["class_names"])
        columns: dict[str, Any] = {name: arrays[name] for name in COLUMNS}
        index = DatasetIndex(
            url=url,
            shard_names=tuple(json.loads(arrays["shard_names"].tobytes())),
            **properties,
            **columns,
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: damaged ({error}); {HOW_TO_MEND}") from error
    if got != index.identity:
        raise DataError(
            f"{where}: its content has hash {got}, it says {index.identity}; "
            f"run `pretrain data index {url} --overwrite`, then `pretrain data verify {url}`"
        )
    problem = _inconsistency(index)
    if problem is not None:
        raise DataError(f"{where}: {problem}; {HOW_TO_MEND}")
    if not index.num_samples:
        raise UsageError(f"{url}: the index lists no samples; pack some images first")
    return index


def _inconsistency(index: DatasetIndex) -> str | None:
    """What in the columns cannot be; the identity says only that they are as they were written."""
    S, M = len(index.shard_names), index.num_chunks
    for name, (dtype, tail) in COLUMNS.items():
        column = getattr(index, name)
        length = S if name.startswith("shard") else M
        if column.dtype != dtype or column.shape != (length, *tail):
            return f"column {name} is {column.dtype}{list(column.shape)}, for {length} rows"
    if M and (index.chunk_shard.min() < 0 or index.chunk_shard.max() >= S):
        return "a chunk names a shard that is not there"
    if (np.diff(index.chunk_shard) < 0).any():
        return "the chunks are not in the order of their shards"
    if M and (index.chunk_samples.min() < 1 or index.chunk_offset.min() < 0 or index.chunk_bytes.min() < 1):
        return "a chunk is empty"
    if (index.chunk_offset + index.chunk_bytes > index.shard_bytes[index.chunk_shard]).any():
        return "a chunk ends after its shard"
    if (
        np.bincount(index.chunk_shard, weights=index.chunk_samples, minlength=S) != index.shard_samples
    ).any():
        return "the chunks of a shard do not add up to its samples"
    if int(index.shard_samples.sum()) != index.num_samples:
        return "the shards do not add up to the number of samples"
    return None


def parse_samples(index: DatasetIndex, buffer: np.ndarray, *, where: str) -> SampleTable:
    """The table in a samples file's bytes, which were held against the index's hash already."""
    arrays, _ = parse_columns(buffer, where=where)
    try:
        keys = Keys(arrays["key_offsets"], arrays["key_bytes"])
        if index.label_kind == "single":
            labels = arrays["labels"]
        else:  # takes no memory: one number, seen N times
            labels = np.broadcast_to(np.int32(NO_LABEL), (index.num_samples,))
        table = SampleTable(
            labels=labels,
            keys=keys,
            label_offsets=arrays["label_offsets"] if index.label_kind == "multi" else None,
            label_values=arrays["label_values"] if index.label_kind == "multi" else None,
        )
    except KeyError as error:
        raise DataError(f"{where}: damaged (no column {error}); {HOW_TO_MEND}") from error
    if len(labels) != index.num_samples or len(keys) != index.num_samples:
        raise DataError(f"{where}: {len(keys)} samples, the index says {index.num_samples}; {HOW_TO_MEND}")
    return table
