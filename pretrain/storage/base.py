"""What a store is: the interface, its settings, and arithmetic on URLs. Local and S3 stores implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pretrain.errors import StorageError
from pretrain.storage.retry import RetryPolicy


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object of a listing. `name` is relative to the store's root and "/"-separated; `size` in bytes."""

    name: str
    size: int
    etag: str | None = None


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """How to talk to an S3 store. Endpoint, region and credentials come from boto3's environment and files.

    `addressing_style` ("path", "virtual", "auto") and `checksums` ("when_required", "when_supported"):
    None means the environment (PRETRAIN_S3_ADDRESSING_STYLE, PRETRAIN_S3_CHECKSUMS), else boto3's default.
    `read_timeout_seconds` is how long a silent connection, or one that only drips, is waited for before the
    range is asked again. An endpoint that has not answered this store yet is given up after `start_seconds`;
    once it has, or where `known_to_answer` says so, `retry` is the patience. `retry_burst` and
    `retries_per_second` bound the retries of all processes of a node together. `share_credentials`: a node's
    processes share credentials that expire, instead of each asking the provider.
    """

    addressing_style: str | None = None
    checksums: str | None = None
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 30.0
    part_bytes: int = 16 << 20  # of a multipart upload; S3 takes 5 MiB to 5 GiB
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    start_seconds: float = 20.0
    known_to_answer: bool = False
    retry_burst: float = 128.0
    retries_per_second: float = 16.0
    share_credentials: bool = True


def at_once(count: int) -> None:
    """The pace of what need not wait."""


class Storage(Protocol):
    """Objects under one root. Instances are picklable and safe to use from many threads and after a fork.

    Every method raises `ObjectNotFoundError` for a missing object or bucket, `AccessDeniedError` for
    refused credentials, and `StorageError` for anything else that retries did not cure. S3 settings, a URL
    or an endpoint that cannot be right are a `UsageError` at the first request.
    """

    @property
    def url(self) -> str:
        """The root, without a slash at its end."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose name starts with `prefix`, in all depths, sorted by name.

        A root that holds nothing, or a folder that is not there, lists nothing; a missing bucket is an error.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes of an object."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the object is there; False, too, where its bucket or folder is not."""
        ...

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Exactly `length` bytes from `offset`, or all that follow it; a shorter object is a StorageError."""
        ...

    def stream(self, name: str, chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
        """The whole object in pieces of `chunk_bytes` (the last one shorter)."""
        ...

    def put(self, name: str, data: bytes | Path, *, pace: Callable[[int], None] = at_once) -> None:
        """Write an object, replacing what was there: readers see the old bytes, or all of the new ones.

        A `Path` is read from local disk, in parts when it is large. `pace` is told, in the caller's thread, how many
        bytes are to go next: it may wait, or raise to give up; then nothing is written.
        """
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create an object; False, and nothing written, if it exists. Of racing callers one gets True."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...

    def local_path(self, name: str) -> Path | None:
        """Where the object lies on this machine's disk; None if it lies elsewhere."""
        ...


def check_name(root_url: str, name: str) -> str:
    """`name`, if it stays under the root. Names come from indexes that others wrote: they are not trusted."""
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in name:
        raise StorageError(
            f"{root_url}: {name!r} is not the name of an object under it; "
            "names are relative, and hold no empty, '.' or '..' part"
        )
    return name


def is_remote(url: str) -> bool:
    """Whether `url` names an object store and not a local file or folder."""
    return url.startswith("s3://")


def join_url(url: str, *names: str) -> str:
    """`url` with `names` below it: join_url("s3://b/p", "x", "y") is "s3://b/p/x/y"."""
    if url.strip("/") == "" and url:
        return "/" + "/".join(names)
    return "/".join([_strip_end(url), *names]) if url else "/".join(names)


def split_url(url: str) -> tuple[str, str]:
    """Parent and last name: "s3://b/p/x.tar" is ("s3://b/p", "x.tar"), "x.tar" is (".", "x.tar").

    A bare bucket or root folder has no last name: "s3://b" is ("s3://b", "").
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    rest = rest.rstrip("/") if rest.strip("/") else rest[:1]
    parent, slash, name = rest.rpartition("/")
    if separator and scheme != "file" and not slash:  # a bare bucket
        return f"{scheme}://{rest}", ""
    if not slash:
        return ("", "") if not rest else (".", rest)
    return f"{scheme}{separator}{parent or '/'}", name


def _strip_end(url: str) -> str:
    """Without slashes at the end, but never into "s3://" or "file:///"."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url.rstrip("/")
    return f"{scheme}://{rest.rstrip('/')}"
