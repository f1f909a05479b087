"""Local folders and S3 buckets behind one small interface."""

from __future__ import annotations

import re

from pretrain.errors import UsageError
from pretrain.storage.base import ObjectInfo, S3Settings, Storage, is_remote, join_url, split_url
from pretrain.storage.cache import ChunkCache, HeldChunk, default_cache_bytes
from pretrain.storage.local import LocalStorage
from pretrain.storage.retry import RetryPolicy
from pretrain.storage.s3 import S3Storage

__all__ = [
    "ChunkCache",
    "HeldChunk",
    "ObjectInfo",
    "RetryPolicy",
    "S3Settings",
    "Storage",
    "default_cache_bytes",
    "is_remote",
    "join_url",
    "open_storage",
    "split_url",
]


def open_storage(url: str, *, s3: S3Settings = S3Settings()) -> Storage:  # noqa: B008 - frozen
    """The store at `url`: "s3://bucket/prefix", "file:///folder" or a path. Does no I/O.

    Raises UsageError for a URL of another kind.
    """
    if is_remote(url):
        return S3Storage(url, settings=s3)
    if url.startswith("file://"):
        folder = url.removeprefix("file://")
        if not folder.startswith("/"):
            raise UsageError(f"{url}: a file URL needs an absolute path; write file:///{folder}")
        return LocalStorage(folder)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    if scheme:
        raise UsageError(
            f"{scheme[0]}…: this kind of storage is not known; use s3://bucket/prefix or a local path"
        )
    if not url:
        raise UsageError("the URL of a store is empty; use s3://bucket/prefix or a local path")
    return LocalStorage(url)
