"""Open the index that lies beside a dataset's shards. Called by reader.py, loader.py and the data tools.

`index.safetensors` is mapped, not read, and in a bucket fetched once a node; the samples file, with each
sample's label and key, is opened only when asked for. index_format.py says what they hold,
index_builder.py makes them.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.data.columns import file_digest
from pretrain.data.index_builder import IndexBuilder, LabelSets, ShardEntry, write_index
from pretrain.data.index_cache import CacheFullError, fetched
from pretrain.data.index_format import (
    INDEX_NAME,
    INDEX_VERSION,
    NO_LABEL,
    SAMPLES_NAME,
    DatasetIndex,
    Found,
    SampleTable,
    parse_index,
    parse_samples,
)
from pretrain.errors import AccessDeniedError, DataError, ObjectNotFoundError, UsageError
from pretrain.storage import S3Settings, Storage, join_url, open_storage

__all__ = [
    "INDEX_NAME",
    "INDEX_VERSION",
    "NO_LABEL",
    "SAMPLES_NAME",
    "UNFINISHED",
    "DatasetIndex",
    "Found",
    "IndexBuilder",
    "LabelSets",
    "SampleTable",
    "ShardEntry",
    "open_index",
    "open_samples",
    "write_index",
]

_DEFAULT_S3 = S3Settings()
_NAMES_LOOKED_AT = 10_000  # to say whether there are shards
_LOGGER = logging.getLogger(__name__)

UNFINISHED = {  # a file that lies beside the shards while a command has not finished there
    "pack-progress.json": "`pretrain data pack` has not finished here; run it again as before, it goes on",
    "redact-progress.json": "`pretrain data redact` has not finished here; run it again as before, it goes on",
    "sync-progress.json": "`pretrain data sync` to here has not finished; run it again as before, it goes on",
}


def open_index(url: str, *, s3: S3Settings = _DEFAULT_S3, cache_dir: Path | None = None) -> DatasetIndex:
    """Open and verify a dataset's index.

    cache_dir: where a node keeps indexes from buckets, for all its processes to map; None holds them in
    memory. A changed index is fetched anew.

    Raises:
        UsageError: there is no index, no such place, no right to read it, or another version.
        DataError: the file is damaged or its content does not match its own hash.
    """
    storage = open_storage(url, s3=s3)
    try:
        path = storage.local_path(INDEX_NAME)
        if path is not None:
            return parse_index(storage.url, _mapped(path, storage.size(INDEX_NAME)))
        version = None if cache_dir is None else _remote_version(storage)
        if cache_dir is None or version is None:
            return parse_index(storage.url, np.frombuffer(storage.read(INDEX_NAME), np.uint8))
        try:
            path = fetched(storage, INDEX_NAME, version=version, cache_dir=cache_dir)
        except CacheFullError as error:
            _say_in_memory(error)
            return open_index(url, s3=s3)
        try:
            return parse_index(storage.url, _mapped(path, path.stat().st_size))
        except DataError:  # damaged on this disk, or in the bucket: what is fetched now tells
            path.unlink(missing_ok=True)
            path = fetched(storage, INDEX_NAME, version=version, cache_dir=cache_dir)
            return parse_index(storage.url, _mapped(path, path.stat().st_size))
    except ObjectNotFoundError as error:
        raise _no_index(storage, url) from error
    except AccessDeniedError as error:
        raise UsageError(str(error)) from error


def _say_in_memory(error: CacheFullError) -> None:
    _LOGGER.warning("cache %s; the index is held in memory by each process", error)


def _remote_version(storage: Storage) -> str | None:
    """What tells one index at this place from the next; None where the store gives no ETag that would."""
    info = next((info for info in storage.list(INDEX_NAME) if info.name == INDEX_NAME), None)
    if info is None:
        raise ObjectNotFoundError(f"{storage.url}: no {INDEX_NAME}")
    return f"{info.size} {info.etag}" if info.etag else None


def _mapped(path: Path, size: int) -> np.ndarray:
    if not size:  # an empty file cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def _no_index(storage: Storage, url: str) -> UsageError:
    """Is it the index that is missing, or the shards, or all of it?"""
    try:
        names = [info.name.lower() for info in itertools.islice(storage.list(), _NAMES_LOOKED_AT)]
        begun = next((name for name in UNFINISHED if storage.exists(name)), None)
    except (ObjectNotFoundError, AccessDeniedError) as error:
        return UsageError(str(error))
    if not names:
        return UsageError(f"{url}: there is nothing there; check the path or URL")
    if begun is not None:
        return UsageError(f"{url}: {UNFINISHED[begun]}")
    if len(names) < _NAMES_LOOKED_AT and not any(name.endswith(".tar") for name in names):
        return UsageError(
            f"{url}: no {INDEX_NAME} there, and no shards; images are made into shards with "
            f"`pretrain data pack {url} OUT`"
        )
    return UsageError(
        f"{url}: no {INDEX_NAME} there; shards need an index, make it with `pretrain data index {url}`"
    )


def _no_samples(index: DatasetIndex, where: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(
        f"{where}: the index needs it, and it is not there; run `pretrain data index {index.url} --overwrite`"
    )


def open_samples(
    index: DatasetIndex, *, s3: S3Settings = _DEFAULT_S3, cache_dir: Path | None = None
) -> SampleTable:
    """Open the per-sample file that belongs to `index`. `cache_dir` as for `open_index`.

    Raises:
        DataError: the file is missing, damaged, or belongs to another index.
    """
    storage = open_storage(index.url, s3=s3)
    name = index.samples_name
    where = join_url(index.url, name)

    def check(digest: str) -> None:
        if digest != index.samples_sha256:
            raise DataError(
                f"{where}: sha256 {digest}, the index says {index.samples_sha256}; "
                f"run `pretrain data index {index.url} --overwrite`"
            )

    path = storage.local_path(name)
    if path is None and cache_dir is not None:
        check_file: Callable[[Path], None] = lambda file: check(file_digest(file))  # noqa: E731
        try:
            path = fetched(storage, name, version=index.samples_sha256, cache_dir=cache_dir, check=check_file)
        except CacheFullError as error:
            _say_in_memory(error)
        except ObjectNotFoundError as error:
            raise _no_samples(index, where) from error
    elif path is not None:
        if not storage.exists(name):
            raise _no_samples(index, where)
        check(file_digest(path))
    if path is None:
        try:
            data = storage.read(name)
        except ObjectNotFoundError as error:
            raise _no_samples(index, where) from error
        check(hashlib.sha256(data).hexdigest())
        return parse_samples(index, np.frombuffer(data, np.uint8), where=where)
    return parse_samples(index, _mapped(path, path.stat().st_size), where=where)
