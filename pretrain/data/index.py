"""The index that lies beside a dataset's shards. Called by reader.py, loader.py and the data tools.

`index.safetensors` holds a column for each property of shards and chunks and is mapped, not read;
`samples.safetensors` holds each sample's label and key and is opened only when asked for. The
identity is a hash over the columns and the class names: two datasets with one identity hold the same
bytes in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from safetensors.numpy import save

from pretrain.errors import AccessDeniedError, DataError, ObjectNotFoundError, UsageError
from pretrain.storage import S3Settings, Storage, join_url, open_storage

INDEX_NAME = "index.safetensors"
SAMPLES_NAME = "samples.safetensors"
INDEX_VERSION = 1
NO_LABEL = -1

_DEFAULT_S3 = S3Settings()
_METADATA_KEY = "pretrain"  # one key: safetensors does not keep the order of several
_COLUMNS = {  # name -> (dtype, shape after the first axis)
    "shard_bytes": (np.int64, ()),
    "shard_samples": (np.int64, ()),
    "shard_sha256": (np.uint8, (32,)),
    "chunk_shard": (np.int32, ()),
    "chunk_offset": (np.int64, ()),
    "chunk_bytes": (np.int64, ()),
    "chunk_samples": (np.int32, ()),
    "chunk_crc32": (np.uint32, ()),
}


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """S shards, M chunks, N samples. Arrays are read-only and may be mapped from the file."""

    url: str
    identity: str  # sha256 hex
    num_samples: int
    shard_names: tuple[str, ...]
    shard_bytes: np.ndarray  # int64[S]
    shard_samples: np.ndarray  # int64[S]
    shard_sha256: np.ndarray  # uint8[S, 32]
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
    plan: str | None = None  # digest of what `pretrain data pack` was asked to make; not in the identity

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_shard)


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """Label and key of every sample, in storage order."""

    labels: np.ndarray  # int64[N], -1 for none
    key_offsets: np.ndarray  # int64[N + 1]
    key_bytes: np.ndarray  # uint8[...], UTF-8

    def key(self, i: int) -> str:
        start, end = int(self.key_offsets[i]), int(self.key_offsets[i + 1])
        return self.key_bytes[start:end].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """What the index says about one shard. Chunk lists are in storage order."""

    name: str
    num_bytes: int
    sha256: bytes
    chunk_offset: Sequence[int]
    chunk_bytes: Sequence[int]
    chunk_samples: Sequence[int]
    chunk_crc32: Sequence[int]
    labels: Sequence[int]
    keys: Sequence[str]
    image_side: int | None = None


class IndexBuilder:
    """Collects shards in order and writes the two files. Called by the data tools."""

    def __init__(
        self,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
        plan: str | None = None,
    ) -> None:
        """`num_classes` is for labels without names; None counts up to the highest label seen."""
        self._class_names = None if class_names is None else tuple(class_names)
        self._num_classes = num_classes
        self._plan = plan
        self._shards: list[ShardEntry] = []

    def add_shard(self, entry: ShardEntry) -> None:
        assert sum(entry.chunk_samples) == len(entry.labels) == len(entry.keys), (
            "chunk counts and labels differ"
        )
        self._shards.append(entry)

    def finish(self, url: str) -> tuple[DatasetIndex, bytes, bytes]:
        """(the index, content of INDEX_NAME, content of SAMPLES_NAME).

        Raises:
            UsageError: no sample was added.
            DataError: a label has no class name, or only some samples have labels.
        """
        shards = self._shards
        labels = np.array([label for shard in shards for label in shard.labels], dtype=np.int64)
        if not len(labels):
            raise UsageError(f"{url}: no samples found; nothing was indexed")
        num_classes = self._count_classes(url, labels)
        samples_file = _pack_samples(labels, [key for shard in shards for key in shard.keys])
        sides = [shard.image_side for shard in shards if shard.image_side is not None]
        columns = {
            "shard_bytes": [shard.num_bytes for shard in shards],
            "shard_samples": [len(shard.labels) for shard in shards],
            "shard_sha256": [np.frombuffer(shard.sha256, np.uint8) for shard in shards],
            "chunk_shard": [i for i, shard in enumerate(shards) for _ in shard.chunk_offset],
        }
        for name in ("chunk_offset", "chunk_bytes", "chunk_samples", "chunk_crc32"):
            columns[name] = [value for shard in shards for value in getattr(shard, name)]
        arrays = {name: np.array(columns[name], dtype=dtype) for name, (dtype, _) in _COLUMNS.items()}
        index = DatasetIndex(
            url=url,
            identity="",
            num_samples=len(labels),
            shard_names=tuple(shard.name for shard in shards),
            class_names=self._class_names,
            num_classes=num_classes,
            image_side=max(sides) if sides else None,
            labels_sorted=num_classes is not None and num_classes > 1 and bool(np.all(np.diff(labels) >= 0)),
            samples_sha256=hashlib.sha256(samples_file).hexdigest(),
            plan=self._plan,
            **arrays,
        )
        index = _with(index, identity=_identity(index))
        return index, _pack_index(index), samples_file

    def _count_classes(self, url: str, labels: np.ndarray) -> int | None:
        missing = int((labels == NO_LABEL).sum())
        if missing == len(labels):
            if self._class_names is not None:
                raise DataError(f"{url}: class names were given, but no sample has a label")
            return None
        if missing:
            raise DataError(
                f"{url}: {missing} of {len(labels)} samples have no label; label all of them or none"
            )
        highest = int(labels.max())
        count = self._num_classes if self._class_names is None else len(self._class_names)
        if count is not None and highest >= count:
            raise DataError(
                f"{url}: label {highest} is out of range, there are {count} classes; "
                "give the names of all classes, in order of their labels"
            )
        return highest + 1 if count is None else count


def write_index(storage: Storage, index_file: bytes, samples_file: bytes) -> None:
    """Put both files, the index last: a dataset with an index is whole."""
    storage.put(SAMPLES_NAME, samples_file)
    storage.put(INDEX_NAME, index_file)


def open_index(url: str, *, s3: S3Settings = _DEFAULT_S3) -> DatasetIndex:
    """Open and verify a dataset's index.

    Raises:
        UsageError: there is no index, no such place, no right to read it, or a newer version.
        DataError: the file is damaged or its content does not match its own hash.
    """
    storage = open_storage(url, s3=s3)
    try:
        buffer = _file_bytes(storage, INDEX_NAME)
    except ObjectNotFoundError as error:
        raise _no_index(storage, url) from error
    except AccessDeniedError as error:
        raise UsageError(str(error)) from error
    return _parse_index(storage.url, buffer)


def _no_index(storage: Storage, url: str) -> UsageError:
    """Is it the index that is missing, or all of it?"""
    try:
        is_empty = next(iter(storage.list()), None) is None
    except (ObjectNotFoundError, AccessDeniedError) as error:
        return UsageError(str(error))
    if is_empty:
        return UsageError(f"{url}: there is nothing there; check the path or URL")
    return UsageError(
        f"{url}: no {INDEX_NAME} there; shards need an index, make it with `pretrain data index {url}`"
    )


def open_samples(index: DatasetIndex, *, s3: S3Settings = _DEFAULT_S3) -> SampleTable:
    """Open the per-sample file that belongs to `index`.

    Raises:
        DataError: the file is missing, damaged, or belongs to another index.
    """
    storage = open_storage(index.url, s3=s3)
    where = join_url(index.url, SAMPLES_NAME)
    buffer = _file_bytes(storage, SAMPLES_NAME)
    digest = hashlib.sha256(buffer.data).hexdigest()
    if digest != index.samples_sha256:
        raise DataError(
            f"{where}: sha256 {digest}, the index says {index.samples_sha256}; "
            f"run `pretrain data index {index.url} --overwrite`"
        )
    arrays, _ = _parse_safetensors(buffer, where=where)
    return SampleTable(
        labels=arrays["labels"], key_offsets=arrays["key_offsets"], key_bytes=arrays["key_bytes"]
    )


def _file_bytes(storage: Storage, name: str) -> np.ndarray:
    """The object as uint8[bytes]: mapped where it is a local file, fetched otherwise."""
    path = storage.local_path(name)
    if path is None:
        return np.frombuffer(storage.read(name), np.uint8)
    if not storage.size(name):  # an empty file cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def _parse_safetensors(buffer: np.ndarray, *, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, our metadata) of a safetensors file, as views of `buffer`. Raises DataError."""
    try:
        header_bytes = int(buffer[:8].view(np.uint64)[0])
        header = json.loads(buffer[8 : 8 + header_bytes].tobytes())
        checksum, _, text = header.pop("__metadata__")[_METADATA_KEY].partition(" ")
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            raise ValueError("the header does not match its checksum")
        metadata = json.loads(text)
        data = buffer[8 + header_bytes :]
        arrays = {}
        for name, entry in header.items():
            dtype = {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8}[entry["dtype"]]
            start, end = entry["data_offsets"]
            if end > len(data):
                raise ValueError(f"it ends before column {name}")
            arrays[name] = data[start:end].view(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: damaged ({error}); make it again with `pretrain data index … --overwrite`"
        ) from error
    return arrays, metadata


def _parse_index(url: str, buffer: np.ndarray) -> DatasetIndex:
    where = join_url(url, INDEX_NAME)
    arrays, metadata = _parse_safetensors(buffer, where=where)
    version = metadata.get("version")
    if version != INDEX_VERSION:
        raise UsageError(
            f"{where}: index version {version}, this program reads {INDEX_VERSION}; "
            f"make it again with `pretrain data index {url} --overwrite`"
        )
    try:
        names = metadata["class_names"]
        index = DatasetIndex(
            url=url,
            identity=metadata["identity"],
            num_samples=metadata["num_samples"],
            shard_names=tuple(json.loads(arrays["shard_names"].tobytes())),
            class_names=None if names is None else tuple(names),
            num_classes=metadata["num_classes"],
            image_side=metadata["image_side"],
            labels_sorted=metadata["labels_sorted"],
            samples_sha256=metadata["samples_sha256"],
            plan=metadata.get("plan"),
            **{name: arrays[name] for name in _COLUMNS},
        )
        got = _identity(index)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: damaged ({error}); make it again with `pretrain data index`") from error
    if got != index.identity:
        raise DataError(
            f"{where}: its content has hash {got}, it says {index.identity}; "
            f"run `pretrain data index {url} --overwrite`, then `pretrain data verify {url}`"
        )
    if not index.num_samples:
        raise UsageError(f"{url}: the index lists no samples; pack some images first")
    return index


def _with(index: DatasetIndex, *, identity: str) -> DatasetIndex:
    values = {field.name: getattr(index, field.name) for field in fields(index)}
    return DatasetIndex(**{**values, "identity": identity})


def _scalars(index: DatasetIndex) -> dict[str, Any]:
    return {
        "version": INDEX_VERSION,
        "num_samples": index.num_samples,
        "class_names": None if index.class_names is None else list(index.class_names),
        "num_classes": index.num_classes,
        "image_side": index.image_side,
        "labels_sorted": index.labels_sorted,
        "samples_sha256": index.samples_sha256,
    }


def _names_blob(index: DatasetIndex) -> bytes:
    return json.dumps(list(index.shard_names)).encode()


def _identity(index: DatasetIndex) -> str:
    """Hash of all columns and properties; not of the URL, which a copy changes, or the plan."""
    digest = hashlib.sha256(json.dumps(_scalars(index), sort_keys=True).encode())
    digest.update(_names_blob(index))
    for name, (dtype, tail) in _COLUMNS.items():
        column = getattr(index, name)
        digest.update(f"{name} {np.dtype(dtype).name} {column.shape}".encode())
        if column.dtype != dtype or column.shape[1:] != tail:
            raise DataError(f"{index.url}: index column {name} is {column.dtype}{column.shape}; index again")
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _pack_index(index: DatasetIndex) -> bytes:
    metadata = {**_scalars(index), "identity": index.identity, "plan": index.plan}
    columns = {name: np.ascontiguousarray(getattr(index, name)) for name in _COLUMNS}
    columns["shard_names"] = np.frombuffer(_names_blob(index), np.uint8)
    return _pack_safetensors(columns, metadata)


def _pack_samples(labels: np.ndarray, keys: Sequence[str]) -> bytes:
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    offsets = np.zeros(len(keys) + 1, np.int64)
    np.cumsum([len(key) for key in encoded], out=offsets[1:])
    columns = {
        "labels": labels,
        "key_offsets": offsets,
        "key_bytes": np.frombuffer(b"".join(encoded), np.uint8),
    }
    return _pack_safetensors(columns, {"version": INDEX_VERSION})


def _pack_safetensors(columns: dict[str, np.ndarray], metadata: dict[str, Any]) -> bytes:
    text = json.dumps(metadata, sort_keys=True)
    return save(columns, metadata={_METADATA_KEY: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})
