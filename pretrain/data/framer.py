"""Find the samples in a piece of a tar file. Called by reader.py and the data tools.

A chunk is a run of whole tar members: `frame` lists the samples in it as offsets, so that nothing is
copied or extracted. `cut_chunks` reads a whole shard as a stream and cuts it into such chunks.

The tar kinds read are ustar, GNU (long names) and PAX. Names are grouped into samples as webdataset
does it (`webdataset.tariterators`): consecutive regular members whose path up to the first dot of the
base name is the same. Unlike webdataset, damage is an error and never a shorter list.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.errors import DataError

BLOCK = 512  # bytes; POSIX.1-1988 ustar
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of several in one sample, the first in this order is read
_IMAGE_SUFFIX_SET = frozenset(IMAGE_SUFFIXES)
KNOWN_SUFFIXES = frozenset((*IMAGE_SUFFIXES, "cls", "txt", "json"))
MAX_EXTENSION_BYTES = 1 << 20  # a PAX record or GNU long name above this is damage, not a name

_ZERO_BLOCK = bytes(BLOCK)
_PLAIN_FILE = ord("0")
_REGULAR = b"0\0007"  # file, old file, contiguous file
_WITHOUT_DATA = b"123456"  # links, devices, directories, pipes: their size field counts no blocks
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset never shows


@dataclass(frozen=True)
class Frame:
    """One sample: `members` maps a lower-case suffix to (offset, length) in bytes inside the chunk."""

    key: str
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class _Member:
    """A tar member with the extension headers before it. Offsets count from the buffer's start."""

    start: int
    name: str | None  # None: not a regular file
    data: int
    size: int
    end: int


class _NeedMoreError(Exception):
    """The buffer ends inside a member; `wanted` bytes of it are needed to go on."""

    def __init__(self, wanted: int, problem: str) -> None:
        super().__init__(problem)
        self.wanted = wanted


def _damaged(offset: int, what: str) -> str:
    return f"damaged tar header at byte {offset} ({what}); fetch or write the shard again"


def _number(field: bytes) -> int:
    """A header's number: octal text, or GNU base 256. Raises ValueError."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _checksum_matches(header: bytes) -> bool:
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    # The sum of a header's bytes with blanks for the checksum field. Adler-32's low half is one plus
    # the sum of all bytes, modulo 65521, at a tenth of the time that summing in Python takes.
    expected = stored - 256 + sum(header[148:156])
    if zlib.adler32(header) & 0xFFFF == (1 + expected) % 65521:
        return True
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:])
    return stored == signed + 256  # some old tars summed signed characters


def _pax_records(body: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header. Raises ValueError."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body) and body[at]:
        space = body.index(b" ", at)
        length = int(body[at:space])
        record = body[space + 1 : at + length]
        if length < 5 or at + length > len(body) or not record.endswith(b"\n"):
            raise ValueError("a record's length is wrong")
        key, _, value = record[:-1].partition(b"=")
        records[key] = value
        at += length
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _extension(kind: bytes, body: bytes) -> tuple[str | None, int | None]:
    """(name, size) that an extension header sets for the member after it. Raises ValueError."""
    if kind == b"L":
        return _text(body.split(b"\0", 1)[0]), None
    if kind == b"K":
        return None, None
    if b"path=" not in body and b"size=" not in body and b"GNU.sparse" not in body:
        return None, None  # the common case: times
    records = _pax_records(body)
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise ValueError("sparse members are not supported")
    name = _text(records[b"path"]) if b"path" in records else None
    size = int(records[b"size"]) if b"size" in records else None
    if kind == b"g" and (name is not None or size is not None):
        raise ValueError("a global header that sets path or size is not supported")
    return name, size


def _member_at(buffer: bytes | bytearray, start: int, *, where: str, base: int) -> _Member | None:
    """The member at `start`, or None at the end-of-archive mark.

    `base` is the buffer's own offset in the shard, for messages. Raises DataError on damage and
    `_NeedMoreError` when the buffer ends before the member's last padding byte.
    """
    at = start
    name: str | None = None
    size: int | None = None
    while True:
        header = bytes(buffer[at : at + BLOCK])
        if len(header) < BLOCK:
            raise _NeedMoreError(at + BLOCK, f"the tar ends inside the header at byte {base + at}")
        if header[0] == 0 and header == _ZERO_BLOCK:
            if at != start:
                raise DataError(f"{where}: the tar ends after the extension header at byte {base + start}")
            return None
        if not _checksum_matches(header):
            raise DataError(f"{where}: {_damaged(base + at, 'checksum')}")
        kind = header[156:157]
        try:
            own_size = _number(header[124:136])
            if own_size < 0:
                raise ValueError("negative size")
            if kind not in b"xgXLK":
                break
            end = at + BLOCK + -(-own_size // BLOCK) * BLOCK
            if own_size > MAX_EXTENSION_BYTES:
                raise ValueError(f"extension of {own_size} bytes")
            if end > len(buffer):
                raise _NeedMoreError(end, f"the tar ends inside the extension header at byte {base + at}")
            found_name, found_size = _extension(kind, bytes(buffer[at + BLOCK : at + BLOCK + own_size]))
        except ValueError as error:
            raise DataError(f"{where}: {_damaged(base + at, str(error))}") from error
        if kind != b"g":
            name = found_name if found_name is not None else name
            size = found_size if found_size is not None else size
        at = end
    if kind == b"S":
        raise DataError(f"{where}: the tar member at byte {base + at} is sparse, which is not supported")
    size = own_size if size is None else size
    if name is None:
        name = _text(header[:100].split(b"\0", 1)[0])
        if header[345] and header[257:263] == b"ustar\0":
            name = _text(header[345:500].split(b"\0", 1)[0]) + "/" + name
    is_file = kind in _REGULAR and not (kind == b"\0" and name.endswith("/"))
    if kind in _WITHOUT_DATA or (not is_file and kind == b"\0"):
        size = 0
    data = at + BLOCK
    end = data + -(-size // BLOCK) * BLOCK
    if end > len(buffer):
        raise _NeedMoreError(
            end,
            f"the tar ends inside member {name!r} at byte {base + at} ({len(buffer) - data} of {size} bytes)",
        )
    return _Member(start, name if is_file else None, data, size, end)


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case suffix) of a member's name by webdataset's rule; None: no part of a sample."""
    if name.startswith("__") and _WEBDATASET_META.match(name):
        return None
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot > base:
        return name[:dot], name[dot + 1 :].lower()
    match = _KEY_AND_SUFFIX.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def _check_tail(buffer: bytes | bytearray, at: int, *, where: str, base: int) -> None:
    if buffer.count(0, at) != len(buffer) - at:
        raise DataError(
            f"{where}: bytes follow the end-of-archive mark at byte {base + at}; "
            "concatenated tars are not shards, write each to a file of its own"
        )


def _check_headers(buffer: bytes, headers: list[int], *, where: str) -> None:
    """Raise DataError at the first of `headers` (offsets, multiples of a block) that is damaged.

    All at once in numpy: a checksum for each header of its own costs a third of `frame`'s time.
    """
    if not headers:
        return
    blocks = np.frombuffer(buffer, np.uint8, count=len(buffer) // BLOCK * BLOCK).reshape(-1, BLOCK)
    rows = blocks[np.array(headers) // BLOCK]
    field = rows[:, 148:156].astype(np.int64)
    stored = (field[:, :6] - ord("0")) @ (8 ** np.arange(5, -1, -1))
    actual = rows.sum(axis=1, dtype=np.int64) - field.sum(axis=1) + 8 * ord(" ")
    for i in np.flatnonzero(stored != actual):  # or another way of writing the field
        if not _checksum_matches(rows[i].tobytes()):
            raise DataError(f"{where}: {_damaged(headers[i], 'checksum')}")


def frame(chunk: bytes | memoryview, *, where: str) -> list[Frame]:
    """The samples of a chunk that have an image, in order.

    Args:
        chunk: whole tar members, with or without the archive's end mark.
        where: the chunk's name for messages.

    Raises:
        DataError: a damaged header, a member that the chunk's end cuts off, a suffix that comes twice
            in one sample, bytes after the end mark.
    """
    buffer = bytes(chunk)
    headers: list[int] = []  # of members that were taken without a look at their checksum
    try:
        frames = _frame(buffer, headers, where=where)
    except _NeedMoreError as error:
        _check_headers(buffer, headers, where=where)  # a damaged size leads astray: name the cause
        raise DataError(f"{where}: {error}; fetch or write the shard again") from error
    except DataError:
        _check_headers(buffer, headers, where=where)
        raise
    _check_headers(buffer, headers, where=where)
    return frames


def _frame(buffer: bytes, headers: list[int], *, where: str) -> list[Frame]:
    frames: list[Frame] = []
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    at = 0
    length = len(buffer)
    while at < length:
        # Nearly every member is a plain file with an octal size and a name that fits its header.
        if (
            at + BLOCK <= length
            and buffer[at + 156] == _PLAIN_FILE
            and buffer[at + 124] < 128
            and not buffer[at + 345]
            and not buffer[at + 99]
        ):
            name: str | None = buffer[at : buffer.find(0, at)].decode("utf-8", "surrogateescape")
            try:
                size = int(buffer[at + 124 : at + 135], 8)
            except ValueError:
                raise DataError(f"{where}: {_damaged(at, 'size')}") from None
            headers.append(at)
            data = at + BLOCK
            at = data + (size + 511 & -BLOCK)
            if size < 0 or at > length:
                raise DataError(f"{where}: the chunk ends inside {name!r} ({length - data} of {size} bytes)")
        else:
            member = _member_at(buffer, at, where=where, base=0)
            if member is None:
                _check_tail(buffer, at, where=where, base=0)
                break
            name, data, size, at = member.name, member.data, member.size, member.end
        parts = split_name(name) if name is not None else None
        if parts is None:
            continue
        if parts[0] != key:
            if key is not None and _has_image(members):
                frames.append(Frame(key, members))
            key, members = parts[0], {}
        suffix = parts[1]
        if suffix in KNOWN_SUFFIXES:
            if suffix in members:
                raise DataError(f"{where}: sample {key!r} holds .{suffix} twice")
            members[suffix] = (data, size)
    if key is not None and _has_image(members):
        frames.append(Frame(key, members))
    return frames


def _has_image(members: dict[str, tuple[int, int]]) -> bool:
    return not _IMAGE_SUFFIX_SET.isdisjoint(members)


def image_of(sample: Frame) -> tuple[str, int, int] | None:
    """(suffix, offset, length) of the sample's image in its chunk; None never comes out of `frame`."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.members:
            return (suffix, *sample.members[suffix])
    return None


def label_of(chunk: bytes | memoryview, sample: Frame) -> int:
    """The sample's class: its `.cls` text, else `label` of its `.json`, else -1 (no label).

    Raises:
        DataError: the text is no integer of at least -1. The message names the sample's key.
    """
    if "cls" in sample.members:
        offset, length = sample.members["cls"]
        text = bytes(chunk[offset : offset + length])
        try:
            label = int(text)
        except ValueError as error:
            raise DataError(f"{sample.key}.cls: a label is one integer, got {text[:40]!r}") from error
    elif "json" in sample.members:
        offset, length = sample.members["json"]
        try:
            record = json.loads(bytes(chunk[offset : offset + length]))
        except ValueError as error:
            raise DataError(f"{sample.key}.json: not JSON ({error})") from error
        found = record.get("label") if isinstance(record, dict) else None
        if found is not None and type(found) is not int:
            raise DataError(f"{sample.key}.json: `label` is one integer, got {found!r:.40}")
        label = -1 if found is None else found
    else:
        return -1
    if label < -1:
        raise DataError(f"{sample.key}: a label is at least 0 (or -1 for none), got {label}")
    return label


@dataclass(frozen=True)
class RawChunk:
    """Consecutive whole samples of a shard: `offset` in the shard, and the bytes themselves."""

    offset: int
    data: bytes


def cut_chunks(
    blocks: Iterable[bytes],
    *,
    where: str,
    target_bytes: int = 8 << 20,
    min_samples: int = 16,
    max_samples: int = 1024,
) -> Iterator[RawChunk]:
    """Cut a shard, read as a stream of blocks of any size, into chunks that do not split a sample.

    A chunk ends at `max_samples`, or at `min_samples` once it holds `target_bytes`. Every chunk holds
    at least one sample with an image. Memory: one chunk and one block.

    Raises:
        DataError: a damaged header, a tar that ends without its end mark or inside a member, bytes
            after the end mark. The message names `where` and the offset.
    """
    source = iter(blocks)
    buffer = bytearray()
    base = 0  # the shard offset of buffer[0], which is the start of the current chunk
    at = 0
    key: str | None = None
    images_of_key = 0
    samples = 0  # whole samples between the chunk's start and `at`, without the one that `key` names

    def more(wanted: int) -> bool:
        while len(buffer) < wanted:
            block = next(source, None)
            if block is None:
                return False
            buffer.extend(block)
        return True

    while True:
        if not more(at + BLOCK) and len(buffer) == at:
            raise DataError(
                f"{where}: truncated: the tar stops at byte {base + at} without its end mark; "
                "fetch or write the shard again"
            )
        try:
            member = _member_at(buffer, at, where=where, base=base)
        except _NeedMoreError as error:
            if more(error.wanted):
                continue
            raise DataError(f"{where}: truncated: {error}; fetch or write the shard again") from error
        if member is None:
            break
        parts = split_name(member.name) if member.name is not None else None
        at = member.end
        if parts is None:
            continue
        if parts[0] != key:
            samples += images_of_key > 0
            if samples >= max_samples or (samples >= min_samples and member.start >= target_bytes):
                yield RawChunk(base, bytes(buffer[: member.start]))
                del buffer[: member.start]
                base += member.start
                at -= member.start
                samples = 0
            key, images_of_key = parts[0], 0
        images_of_key += parts[1] in IMAGE_SUFFIXES
    if samples or images_of_key:
        yield RawChunk(base, bytes(buffer[:at]))
    del buffer[:at]
    base += at
    _check_tail(buffer, 0, where=where, base=base)
    for block in source:
        _check_tail(block, 0, where=where, base=base)
