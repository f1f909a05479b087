"""Find the samples in a piece of a tar file. Called by frame_table.py and the data tools.

A chunk is a run of whole tar members: `frame` lists the samples in it as offsets, so that nothing is
copied or extracted. `cut_chunks` reads a whole shard as a stream and cuts it into such chunks.

The tar kinds read are ustar, GNU (long names) and PAX. Names are grouped into samples as webdataset
does it (`webdataset.tariterators`): consecutive regular members whose path up to the first dot of the
base name is the same. Unlike webdataset, damage is an error and never a shorter list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pretrain.data.tar import BLOCK, NeedMoreError, TarStream, check_tail, member_at, plain_headers
from pretrain.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # of several in one sample, the first in this order is read
MAX_LABEL = 2**31 - 1  # labels are held as int32
_IMAGE_SUFFIX_SET = frozenset(IMAGE_SUFFIXES)
KNOWN_SUFFIXES = frozenset((*IMAGE_SUFFIXES, "cls", "txt", "json"))

_PLAIN_SUFFIXES = {suffix.encode(): suffix for suffix in KNOWN_SUFFIXES}
_KEY_AND_SUFFIX = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_WEBDATASET_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset never shows


@dataclass(frozen=True)
class Frame:
    """One sample: `members` maps a lower-case suffix to (offset, length) in bytes inside the chunk."""

    key: str
    members: dict[str, tuple[int, int]]


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
    plain = plain_headers(buffer)
    frames: list[Frame] = []
    key: str | None = None
    members: dict[str, tuple[int, int]] = {}
    prefix = b""  # the current key and its dot
    block = 0
    while block * BLOCK < len(buffer):
        header = plain.get(block)
        if header is not None:
            raw_name, size, end = header
            if prefix and raw_name.startswith(prefix) and raw_name[len(prefix) :] in _PLAIN_SUFFIXES:
                # The next member of the same sample, as most are: no need to split its name.
                suffix = _PLAIN_SUFFIXES[raw_name[len(prefix) :]]
                if suffix in members:
                    raise DataError(f"{where}: sample {key!r} holds .{suffix} twice")
                members[suffix] = ((block + 1) * BLOCK, size)
                block = end
                continue
            name: str | None = raw_name.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            data = (block + 1) * BLOCK
            block = end
        else:
            try:
                member = member_at(buffer, block * BLOCK, where=where, base=0)
            except NeedMoreError as error:
                raise DataError(f"{where}: {error}; fetch or write the shard again") from error
            if member is None:
                check_tail(buffer, block * BLOCK, where=where, base=0)
                break
            name, data, size = member.name, member.data, member.size
            block = member.end // BLOCK
        parts = split_name(name) if name is not None else None
        if parts is None:
            continue
        if parts[0] != key:
            if key is not None and _has_image(members):
                frames.append(Frame(key, members))
            key, members = parts[0], {}
            prefix = key.encode("utf-8", "surrogateescape") + b"."
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
    """The sample's one class, or -1: no label, or a list of them. Raises as `labels_of`."""
    labels = labels_of(chunk, sample)
    return labels if isinstance(labels, int) else -1


def labels_of(chunk: bytes | memoryview, sample: Frame) -> int | tuple[int, ...]:
    """The sample's label: its `.cls` text, else `label` of its `.json` (an integer or a list), else -1 (none).

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
        except (ValueError, RecursionError) as error:
            raise DataError(f"{sample.key}.json: not JSON ({error})") from error
        found = record.get("label") if isinstance(record, dict) else None
        if isinstance(found, list) and all(type(one) is int and one >= 0 for one in found):
            return tuple(sorted(set(found)))
        if found is not None and type(found) is not int:
            raise DataError(f"{sample.key}.json: `label` is an integer or a list of them, got {found!r:.40}")
        label = -1 if found is None else found
    else:
        return -1
    if not -1 <= label <= MAX_LABEL:
        raise DataError(
            f"{sample.key}: a label is from 0 (or -1 for none) to {MAX_LABEL}, got {_text_of(label)}"
        )
    return label


def _text_of(label: int) -> str:
    """Python refuses to write out integers of thousands of digits."""
    return str(label) if abs(label) < 10**40 else f"one of {label.bit_length()} bits"


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
    on_left_out: Callable[[str, set[str]], None] | None = None,
) -> Iterator[RawChunk]:
    """Cut a shard, read as a stream of blocks of any size, into chunks that do not split a sample.

    A chunk ends at `max_samples`, or at `min_samples` once it holds `target_bytes`. Every chunk holds
    at least one sample with an image; `on_left_out` is told key and suffixes of samples that have none.
    Memory: one chunk and one block.

    Raises:
        DataError: a damaged header, a tar that ends without its end mark or inside a member, bytes
            after the end mark. The message names `where` and the offset.
    """
    stream = TarStream(blocks, where=where)
    at = 0
    key: str | None = None
    suffixes: set[str] = set()  # of the sample that `key` names
    samples = 0  # whole samples in the chunk, without that one

    def count_key() -> int:
        if not suffixes.isdisjoint(IMAGE_SUFFIXES):
            return 1
        if key is not None and on_left_out is not None:
            on_left_out(key, suffixes)
        return 0

    while (member := stream.member_at(at)) is not None:
        at = member.end
        parts = split_name(member.name) if member.name is not None else None
        if parts is None:
            continue
        if parts[0] != key:
            samples += count_key()
            if samples >= max_samples or (samples >= min_samples and member.start >= target_bytes):
                yield RawChunk(stream.base, bytes(stream.buffer[: member.start]))
                stream.drop(member.start)
                at -= member.start
                samples = 0
            key, suffixes = parts[0], set()
        suffixes.add(parts[1])
    samples += count_key()
    if samples:
        yield RawChunk(stream.base, bytes(stream.buffer[:at]))
    stream.drop(at)
    stream.finish()
