"""An S3 bucket, or a prefix in one, as a store. Opened by `open_storage`.

Retries are all ours: botocore repeats a request but never a body (boto3#4111), so its own are switched
off, one policy bounds the whole and one budget a node bounds them all. A body that breaks off is resumed at
the byte where it stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from pretrain.errors import ObjectChangedError, ObjectNotFoundError, PretrainError, StorageError, UsageError
from pretrain.storage import counters
from pretrain.storage.base import ObjectInfo, S3Settings, at_once, check_name
from pretrain.storage.credentials import CredentialsExpiredError
from pretrain.storage.retry import Retries
from pretrain.storage.retry_budget import RetryBudget, node_budget
from pretrain.storage.s3_body import pieces
from pretrain.storage.s3_client import make_client
from pretrain.storage.s3_errors import failures, is_transient, status_of, to_typed_error

T = TypeVar("T")
# Named here: inside the class, `list` is the method.
Blocks = list[bytes]
Parts = list[dict[str, Any]]

_BLOCK_BYTES = 1 << 20  # read from a connection at once, if so much has come in
_PROGRESS_BYTES = 64 << 10  # less than this in an attempt is a store that drips, not one that serves
# Their provider has been asked since long before they expired; ended, and said, within ten seconds after that.
_EXPIRED_SECONDS = 6.0
_MOST_PARTS = 10_000  # S3's limit for a multipart upload
_UPLOAD_THREADS = 4
_WRITER_KEY = "pretrain-writer"  # metadata by which a writer knows its own object again


class S3Storage:
    """Objects under `s3://bucket[/prefix]`. Implements `Storage`."""

    def __init__(self, url: str, *, settings: S3Settings) -> None:
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if "@" in bucket:  # not echoed: what stands before the @ may be a secret
            raise UsageError(
                "an s3:// URL holds credentials; give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not bucket:
            raise UsageError(f"{url}: there is no bucket in this URL; use s3://bucket/prefix")
        self._bucket = bucket
        self._prefix = prefix.rstrip("/")
        self._settings = settings
        self._answered = settings.known_to_answer  # has the endpoint ever said anything?
        # Of a process, by its id: a client from before a fork would share the parent's sockets.
        self._connection_of: tuple[int, Any, RetryBudget] | None = None
        self._making: dict[int, threading.Lock] = {}  # by process: a fork may copy a lock that is held

    def __reduce__(self) -> tuple[Callable[..., S3Storage], tuple[str, S3Settings]]:
        return _reopen, (self.url, self._settings)

    def __repr__(self) -> str:
        return f"S3Storage({self.url!r})"

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def local_path(self, name: str) -> Path | None:
        return None

    # -- reading ---------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        root = f"{self._prefix}/" if self._prefix else ""
        where = {"Bucket": self._bucket, "Prefix": root + prefix}
        while True:
            page = self._call(lambda client: client.list_objects_v2(**where), self.url)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # consoles mark folders with such empty objects
                    name = entry["Key"].removeprefix(root)
                    yield ObjectInfo(name=name, size=entry["Size"], etag=entry.get("ETag"))
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, name: str) -> int:
        return int(self._head(name)["ContentLength"])

    def exists(self, name: str) -> bool:
        try:
            self._head(name)
        except ObjectNotFoundError:
            return False
        return True

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if length == 0:  # HTTP has no empty range; the bounds are checked as for any other
            if offset > self.size(name):
                raise self._too_short(name, offset, offset)
            return b""
        end = None if length is None else offset + length
        return b"".join(self._blocks(name, offset, end))

    def stream(self, name: str, chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
        held: Blocks = []
        held_bytes = 0
        for block in self._blocks(name, 0, None):
            held.append(block)
            held_bytes += len(block)
            while held_bytes >= chunk_bytes:
                joined = b"".join(held)
                yield joined[:chunk_bytes]
                held = [joined[chunk_bytes:]]
                held_bytes -= chunk_bytes
        if held_bytes:
            yield b"".join(held)

    def _blocks(self, name: str, offset: int, end: int | None) -> Iterator[bytes]:
        """Bytes from `offset` to `end` (None: the last one), resumed after a fault at the byte it came at.

        The first answer's ETag is asked for (`If-Match`), and compared, in all later ones: the bytes are of
        one version of the object.
        """
        url = self._url_of(name)
        retries = self._retries()
        position, etag = offset, None
        while True:
            attempt_started_at = position
            try:
                answer = self._get(name, position, end, etag)
                self._answered = True
                etag, end = self._check_answer(name, answer, position, end, etag)
                with contextlib.closing(answer["Body"]) as body:
                    for piece in pieces(
                        body,
                        length=int(answer["ContentLength"]),
                        most_bytes=_BLOCK_BYTES,
                        least_bytes=_PROGRESS_BYTES,
                        seconds=self._settings.read_timeout_seconds,
                    ):
                        position += len(piece)
                        counters.add(read_bytes=len(piece))  # at once: a slow store is not a hung process
                        yield piece
                # botocore raises for a body shorter than its Content-Length; the ranges are ours to check.
                if position != end:
                    raise StorageError(
                        f"{url}: the body ended at byte {position}, but its range said {end}; check the store"
                    )
                retries.succeeded()
                return
            except failures() as error:
                self._answered = self._answered or status_of(error) is not None
                if status_of(error) == 416:
                    size = self.size(name)
                    if end is None and offset == size:
                        return
                    raise self._too_short(name, offset, end) from None
                if status_of(error) == 412:
                    raise self._changed(name) from None
                if position - attempt_started_at >= _PROGRESS_BYTES:
                    retries.progressed()
                if position == end and is_transient(error):
                    return  # the fault came after the last byte
                if not self._may_try_again(error, retries):
                    raise self._to_typed_error(error, url, retries) from None
                counters.add(retried_bytes=0 if end is None else end - position)

    def _get(self, name: str, position: int, end: int | None, etag: str | None) -> dict[str, Any]:
        wanted: dict[str, str] = {}
        if position or end is not None:
            wanted["Range"] = f"bytes={position}-{'' if end is None else end - 1}"
        if etag:
            wanted["IfMatch"] = etag
        counters.add(requests=1)
        answer: dict[str, Any] = self._client().get_object(Bucket=self._bucket, Key=self._key(name), **wanted)
        return answer

    def _check_answer(
        self, name: str, answer: dict[str, Any], position: int, end: int | None, etag: str | None
    ) -> tuple[str | None, int]:
        """The object's ETag and the end of what was asked for, if the answer is what was asked for."""
        if etag and answer.get("ETag") != etag:  # a store may ignore If-Match
            raise self._changed(name)
        if not position and end is None:
            return answer.get("ETag"), int(answer["ContentLength"])
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("ContentRange", ""))
        if not match or int(match[1]) != position:
            raise StorageError(
                f"{self._url_of(name)}: the store does not answer ranges "
                f"(Content-Range {answer.get('ContentRange')!r}); use one that does, or copy the data first"
            )
        last = int(match[2]) + 1
        if end is not None and last != end:
            raise self._too_short(name, position, end)
        return answer.get("ETag"), last

    def _head(self, name: str) -> dict[str, Any]:
        key = self._key(name)
        return self._call(lambda client: client.head_object(Bucket=self._bucket, Key=key), self._url_of(name))

    # -- writing ---------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes | Path, *, pace: Callable[[int], None] = at_once) -> None:
        # S3 shows an object only when it has all of it, so a put is atomic as it is.
        size = _size_of_source(data)
        if size > 2 * self._settings.part_bytes:
            self._put_in_parts(name, data, size, pace)
            return
        pace(size)
        key, body = self._key(name), _part_of(data, 0, size)
        self._call(
            lambda client: client.put_object(Bucket=self._bucket, Key=key, Body=body), self._url_of(name)
        )

    def put_if_absent(self, name: str, data: bytes) -> bool:
        key, url, writer = self._key(name), self._url_of(name), secrets.token_hex(16)
        metadata = {_WRITER_KEY: writer}

        def create(client: Any) -> bool:
            try:
                client.put_object(Bucket=self._bucket, Key=key, Body=data, IfNoneMatch="*", Metadata=metadata)
            except failures() as error:
                if status_of(error) != 412:
                    raise
                return False
            return True

        if self._call(create, url):
            return True
        # It exists: by another writer, or by us, if the answer to an earlier attempt was lost on its way.
        try:
            return bool(self._head(name).get("Metadata", {}).get(_WRITER_KEY) == writer)
        except ObjectNotFoundError:
            return False  # existed, and has been deleted since

    def delete(self, name: str) -> None:
        key = self._key(name)
        self._call(lambda client: client.delete_object(Bucket=self._bucket, Key=key), self._url_of(name))

    def _put_in_parts(self, name: str, data: bytes | Path, size: int, pace: Callable[[int], None]) -> None:
        url, writer = self._url_of(name), secrets.token_hex(16)
        part_bytes = max(self._settings.part_bytes, math.ceil(size / _MOST_PARTS))
        where: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key(name)}
        created = self._call(
            lambda client: client.create_multipart_upload(**where, Metadata={_WRITER_KEY: writer}), url
        )
        where["UploadId"] = created["UploadId"]

        def upload(number: int) -> dict[str, Any]:
            start = number * part_bytes
            body = _part_of(data, start, min(part_bytes, size - start))
            answer = self._call(
                lambda client: client.upload_part(**where, PartNumber=number + 1, Body=body), url
            )
            # Stores that check parts by more than their ETag give a checksum back, and want it at the end.
            checksums = {
                key: value for key, value in answer.items() if re.fullmatch("Checksum[A-Z0-9]+", key)
            }
            return {"PartNumber": number + 1, "ETag": answer["ETag"], **checksums}

        try:
            with ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
                try:
                    futures: list[Future[dict[str, Any]]] = []
                    for number in range(math.ceil(size / part_bytes)):
                        if number >= _UPLOAD_THREADS:  # so that `pace` speaks of what goes next
                            futures[number - _UPLOAD_THREADS].result()
                        pace(min(part_bytes, size - number * part_bytes))
                        futures.append(pool.submit(upload, number))
                    parts = [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            self._complete(name, where, parts, writer)
        except BaseException:
            # Parts of an unfinished upload are invisible and cost money. The first error is the one to
            # report; if this fails as well, a lifecycle rule of the bucket is what removes them.
            with contextlib.suppress(StorageError):
                self._call(lambda client: client.abort_multipart_upload(**where), url)
            raise

    def _complete(self, name: str, where: dict[str, Any], parts: Parts, writer: str) -> None:
        try:
            self._call(
                lambda client: client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts}),
                self._url_of(name),
            )
        except ObjectNotFoundError:
            # No such upload: it was completed by an attempt whose answer was lost, if the object is ours.
            if self._head(name).get("Metadata", {}).get(_WRITER_KEY) != writer:
                raise

    # -- requests --------------------------------------------------------------------------------------

    def _call(self, request: Callable[[Any], T], url: str) -> T:
        """What `request(client)` returns, tried again after faults that pass."""
        retries = self._retries()
        while True:
            try:
                counters.add(requests=1)
                answer = request(self._client())
                self._answered = True
                retries.succeeded()
                return answer
            except failures() as error:
                self._answered = self._answered or status_of(error) is not None
                if not self._may_try_again(error, retries):
                    raise self._to_typed_error(error, url, retries) from None

    def _retries(self) -> Retries:
        return Retries(self._settings.retry, budget=self._connection()[2])

    def _may_try_again(self, error: Exception, retries: Retries) -> bool:
        # An endpoint that has never answered may be a wrong one: it does not get the patience of a run.
        seconds = None if self._answered else self._settings.start_seconds
        if isinstance(error, CredentialsExpiredError):
            seconds = _EXPIRED_SECONDS
        return is_transient(error) and retries.try_again(seconds=seconds)

    def _to_typed_error(self, error: Exception, url: str, retries: Retries) -> PretrainError:
        return to_typed_error(error, url=url, retries=retries, answered=self._answered)

    def _client(self) -> Any:
        return self._connection()[1]

    def _connection(self) -> tuple[int, Any, RetryBudget]:
        held, process = self._connection_of, os.getpid()
        if held is not None and held[0] == process:
            return held
        # A client takes a good part of a second to make: threads that start together make one.
        with self._making.setdefault(process, threading.Lock()):
            held = self._connection_of
            if held is None or held[0] != process:
                settings = self._settings
                client = make_client(settings, self.url)
                budget = node_budget(
                    client.meta.endpoint_url,
                    burst=settings.retry_burst,
                    per_second=settings.retries_per_second,
                )
                held = self._connection_of = (process, client, budget)
        return held

    def _key(self, name: str) -> str:
        check_name(self.url, name)
        return f"{self._prefix}/{name}" if self._prefix else name

    def _url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _too_short(self, name: str, offset: int, end: int | None) -> StorageError:
        return StorageError(
            f"{self._url_of(name)}: bytes {offset} to {'its end' if end is None else end} were asked for, "
            f"but it holds {self.size(name)}; it is cut short or was replaced"
        )

    def _changed(self, name: str) -> ObjectChangedError:
        return ObjectChangedError(
            f"{self._url_of(name)}: it was replaced while being read; keep shards unchanged during a run"
        )


def _reopen(url: str, settings: S3Settings) -> S3Storage:
    return S3Storage(url, settings=settings)


def _size_of_source(data: bytes | Path) -> int:
    if not isinstance(data, Path):
        return len(data)
    try:
        return data.stat().st_size
    except OSError as error:
        raise _unreadable(data, error) from None


def _part_of(data: bytes | Path, start: int, count: int) -> bytes:
    if not isinstance(data, Path):
        return data if count == len(data) else data[start : start + count]
    try:
        with open(data, "rb") as file:
            file.seek(start)
            part = file.read(count)
    except OSError as error:
        raise _unreadable(data, error) from None
    if len(part) != count:
        raise StorageError(f"{data}: it became shorter while being uploaded")
    return part


def _unreadable(path: Path, error: OSError) -> StorageError:
    kind = ObjectNotFoundError if isinstance(error, FileNotFoundError) else StorageError
    return kind(f"{path}: cannot be read for an upload: {error.strerror or error}; check the path")
