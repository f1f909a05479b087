"""Walk the members of a tar file, where damage is an error. Called by framer.py and the data tools.

The kinds read are ustar, GNU (long names) and PAX. Python's tarfile stops without a word at most kinds
of damage and is ten times slower; it is the oracle in the tests.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError

BLOCK = 512  # bytes; POSIX.1-1988 ustar
PLAIN_FILE = ord("0")
MAX_EXTENSION_BYTES = 1 << 20  # a PAX record or GNU long name above this is damage, not a name

_DTYPES = (np.uint8, np.int64, np.int64)  # of PlainMembers
_ZERO_BLOCK = bytes(BLOCK)
_REGULAR = b"0\0007"  # file, old file, contiguous file
_WITHOUT_DATA = b"123456"  # links, devices, directories, pipes: their size field counts no blocks


@dataclass(frozen=True)
class Member:
    """A tar member with the extension headers before it. Offsets count from the buffer's start."""

    start: int
    name: str | None  # None: not a regular file
    data: int
    size: int
    end: int


class NeedMoreError(Exception):
    """The buffer ends inside a member; `wanted` bytes of it are needed to go on."""

    def __init__(self, wanted: int, problem: str) -> None:
        super().__init__(problem)
        self.wanted = wanted


_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"PK\3\4": "zip",
}


def damaged(offset: int, what: str) -> str:
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
    records = _pax_records(body)
    if any(key.startswith(b"GNU.sparse") for key in records):
        raise ValueError("sparse members are not supported")
    if b"\0" in records.get(b"path", b""):
        raise ValueError("a name that holds a NUL")
    name = _text(records[b"path"]) if b"path" in records else None
    size = int(records[b"size"]) if b"size" in records else None
    if kind == b"g" and (name is not None or size is not None):
        raise ValueError("a global header that sets path or size is not supported")
    return name, size


def member_at(buffer: bytes | bytearray, start: int, *, where: str, base: int) -> Member | None:
    """The member at `start`, or None at the end-of-archive mark.

    `base` is the buffer's own offset in the shard, for messages. Raises DataError on damage and
    `NeedMoreError` when the buffer ends before the member's last padding byte.
    """
    at = start
    name: str | None = None
    size: int | None = None
    extensions = b""  # their kinds
    while True:
        header = bytes(buffer[at : at + BLOCK])
        if len(header) < BLOCK:
            raise NeedMoreError(at + BLOCK, f"the tar ends inside the header at byte {base + at}")
        if header[0] == 0 and header == _ZERO_BLOCK:
            if at != start:
                raise DataError(f"{where}: the tar ends after the extension header at byte {base + start}")
            return None
        if not _checksum_matches(header):
            if base + at == 0 and (kinds := [_MAGIC[magic] for magic in _MAGIC if header.startswith(magic)]):
                raise DataError(
                    f"{where}: is compressed ({kinds[0]}), so chunks cannot be read out of it; unpack it"
                )
            raise DataError(f"{where}: {damaged(base + at, 'checksum')}")
        kind = header[156:157]
        try:
            own_size = _number(header[124:136])
            if own_size < 0:
                raise ValueError("negative size")
            if kind not in b"xgXLK":
                break
            if kind in extensions and kind != b"g":
                raise ValueError(
                    "a second extension header of one kind: the member after the first is missing"
                )
            extensions += kind
            end = at + BLOCK + -(-own_size // BLOCK) * BLOCK
            if own_size > MAX_EXTENSION_BYTES:
                raise ValueError(f"extension of {own_size} bytes")
            if end > len(buffer):
                raise NeedMoreError(end, f"the tar ends inside the extension header at byte {base + at}")
            if buffer[at + BLOCK + own_size : end].strip(b"\0"):
                raise ValueError("an extension that goes on after its stated size")
            found_name, found_size = _extension(kind, bytes(buffer[at + BLOCK : at + BLOCK + own_size]))
        except ValueError as error:
            raise DataError(f"{where}: {damaged(base + at, str(error))}") from error
        if kind != b"g":
            name = found_name if found_name is not None else name
            size = found_size if found_size is not None else size
        at = end
    if kind == b"S":
        raise DataError(
            f"{where}: the tar member at byte {base + at} is sparse, which is not supported; "
            "write the tar without --sparse"
        )
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
        raise NeedMoreError(
            end,
            f"the tar ends inside member {name!r} at byte {base + at} ({len(buffer) - data} of {size} bytes)",
        )
    return Member(start, name if is_file else None, data, size, end)


def check_tail(buffer: bytes | bytearray, at: int, *, where: str, base: int) -> None:
    if buffer.count(0, at) != len(buffer) - at:
        raise DataError(
            f"{where}: bytes follow the end-of-archive mark at byte {base + at}; "
            "concatenated tars are not shards, write each to a file of its own"
        )


def plain_headers(buffer: bytes) -> dict[int, tuple[bytes, int, int]]:
    """Block number -> (name, size in bytes, block number of the next member) of what looks like a plain file.

    Whole, with a matching checksum, an octal size and a name that fits its field. Nearly every header is
    of this kind, and in numpy they cost a tenth of what `member_at` takes. A block inside a file's data
    may look like one too: only walking from member to member tells.
    """
    blocks = np.frombuffer(buffer, np.uint8, count=len(buffer) // BLOCK * BLOCK).reshape(-1, BLOCK)
    marked = np.flatnonzero((blocks[:, 257] == ord("u")) & (blocks[:, 156] == PLAIN_FILE))
    rows = blocks[marked]
    number = rows[:, 124:154].astype(np.int64) - ord("0")  # size field, times, checksum field
    size_digits, sum_digits = number[:, :11], number[:, 24:30]
    sizes = size_digits @ (8 ** np.arange(10, -1, -1))
    stored = sum_digits @ (8 ** np.arange(5, -1, -1))
    actual = rows.sum(axis=1, dtype=np.int64) - rows[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    ends = marked + 1 + (sizes + BLOCK - 1) // BLOCK
    plain = (
        (stored == actual)
        & (size_digits.min(axis=1, initial=0) >= 0)
        & (size_digits.max(axis=1, initial=0) <= 7)
        & _are_ended(rows).all(axis=1)
        & (rows[:, 99] == 0)
        & (rows[:, 345] == 0)
        & (ends <= len(blocks))
    )
    names = np.ascontiguousarray(rows[plain, :100]).view("S100")[:, 0].tolist()
    values = zip(names, sizes[plain].tolist(), ends[plain].tolist(), strict=True)
    return dict(zip(marked[plain].tolist(), values, strict=True))


def _are_ended(headers: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """[m, 3]: does a NUL or a blank end each number? Without one, the field's last byte is a digit more."""
    ends = headers[:, (135, 154, 155)]  # of the size; of the checksum
    return (ends == 0) | (ends == ord(" "))


class PlainMembers(NamedTuple):
    """The m members of a tar that holds plain files only."""

    names: npt.NDArray[np.uint8]  # [m, longest name + 1], NUL behind each name
    data: npt.NDArray[np.int64]  # [m], where the file is, bytes from the buffer's start
    sizes: npt.NDArray[np.int64]  # [m], in bytes


def plain_members(buffer: bytes) -> PlainMembers | None:
    """All members, if every one is a plain file with a sound header and the end is sound too; else None.

    Such a header has a matching checksum, an octal size and a name that fits its field and that nothing
    follows there. A tar that is None here is not therefore damaged: `member_at` tells.
    """
    compiled = _compiled()
    if compiled is None:
        return plain_members_in_python(buffer)
    if (found := compiled.plain(buffer)) is None:
        return None
    names, data, sizes = (np.frombuffer(column, dtype) for column, dtype in zip(found, _DTYPES, strict=True))
    return PlainMembers(names.reshape(len(data), -1), data, sizes)


@cache
def _compiled() -> Any:
    """`_tar_members.c`, or None where it was not compiled."""
    try:
        return importlib.import_module("pretrain.data._tar_members")
    except ImportError:
        return None


def plain_members_in_python(buffer: bytes) -> PlainMembers | None:
    """`plain_members` without compiled parts."""
    starts: list[int] = []
    at, end = 0, len(buffer)
    try:
        while at < end:
            size = int(buffer[at + 124 : at + 135], 8)
            if size < 0:
                return None
            starts.append(at)
            at += BLOCK + (size + BLOCK - 1 & -BLOCK)
    except ValueError:
        pass  # the end mark, or what only member_at understands
    if at > end or not starts or (at < end and (end - at < BLOCK or buffer.count(0, at) != end - at)):
        return None
    places = np.array(starts)
    blocks = np.frombuffer(buffer, np.uint8, count=end // BLOCK * BLOCK).reshape(-1, BLOCK)
    rows = blocks[places // BLOCK]
    number = rows[:, 124:154].astype(np.int64) - ord("0")  # size field, times, checksum field
    size_digits, sum_digits = number[:, :11], number[:, 24:30]
    sums = rows.sum(axis=1, dtype=np.uint32) - rows[:, 148:156].sum(axis=1, dtype=np.uint32)
    actual = sums.astype(np.int64) + 8 * ord(" ")  # the checksum's own field counts as blanks
    longest = int(rows[:, :100].any(axis=0).nonzero()[0].max(initial=0)) + 1
    names = rows[:, : longest + 1]
    if (
        longest >= 100
        or not np.array_equal(sum_digits @ (8 ** np.arange(5, -1, -1)), actual)
        or size_digits.min() < 0
        or size_digits.max() > 7
        or not _are_ended(rows).all()
        or (rows[:, 156] != PLAIN_FILE).any()
        or (rows[:, 257:262] != np.frombuffer(b"ustar", np.uint8)).any()
        or rows[:, 345].any()
        or ((names[:, :-1] == 0) & (names[:, 1:] != 0)).any()
    ):
        return None
    return PlainMembers(names, places + BLOCK, size_digits @ (8 ** np.arange(10, -1, -1)))


class TarStream:
    """A tar read as blocks of any size. `buffer` holds what was not dropped yet, from offset `base` on."""

    def __init__(self, blocks: Iterable[bytes], *, where: str) -> None:
        self._source, self._where = iter(blocks), where
        self.buffer = bytearray()
        self.base = 0

    def _fill(self, wanted: int) -> bool:
        while len(self.buffer) < wanted:
            block = next(self._source, None)
            if block is None:
                return False
            self.buffer.extend(block)
        return True

    def member_at(self, at: int) -> Member | None:
        """The member at `at` in the buffer, whole, or None at the end mark. DataError if there is neither."""
        if not self._fill(at + BLOCK) and len(self.buffer) == at:
            raise DataError(
                f"{self._where}: truncated: the tar stops at byte {self.base + at} without its end mark; "
                "fetch or write the shard again"
            )
        while True:
            try:
                return member_at(self.buffer, at, where=self._where, base=self.base)
            except NeedMoreError as error:
                if not self._fill(error.wanted):
                    raise DataError(
                        f"{self._where}: truncated: {error}; fetch or write the shard again"
                    ) from error

    def drop(self, count: int) -> None:
        del self.buffer[:count]
        self.base += count

    def finish(self) -> None:
        """Check that only zeros follow the end mark, which the buffer starts with."""
        end = self.base
        check_tail(self.buffer, 0, where=self._where, base=end)
        for block in self._source:
            check_tail(block, 0, where=self._where, base=end)


def list_members(blocks: Iterable[bytes], *, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of every regular file in a tar of any content, read as a stream of blocks.

    Raises:
        DataError: as `cut_chunks`.
    """
    stream = TarStream(blocks, where=where)
    while (member := stream.member_at(0)) is not None:
        if member.name is not None:
            yield member.name, stream.base + member.data, member.size
        stream.drop(member.end)
    stream.finish()
