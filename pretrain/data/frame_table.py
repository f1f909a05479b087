"""Where the images of a chunk are, and their labels, as columns. Called by reader.py.

Nearly every chunk holds nothing but plain members with plain names, and such a chunk is framed by a few dozen
numpy operations on all its headers at once. Whatever is not of that kind, damage above all, goes the way of
`framer.frame`, which says what is wrong; both give the same table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.framer import IMAGE_SUFFIXES, Frame, frame, image_of, label_of
from pretrain.data.tar import PlainMembers, plain_members
from pretrain.errors import DataError

_SUFFIXES = (*IMAGE_SUFFIXES, "cls", "json", "txt")
_CODE_BYTES = max(map(len, _SUFFIXES)) + 1  # the byte after the longest, to tell it from longer ones
_POWERS = 256 ** np.arange(_CODE_BYTES, dtype=np.int64)
_BY_CODE = sorted((int.from_bytes(suffix.encode(), "little"), kind) for kind, suffix in enumerate(_SUFFIXES))
_CODES, _KINDS = np.array(_BY_CODE).T
_LABEL_DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class FrameTable:
    """A chunk's n samples in few bytes: a process may hold a million of them."""

    offsets: npt.NDArray[np.int64]  # [n], of the images, bytes from the chunk's start
    lengths: npt.NDArray[np.int64]  # [n]
    labels: npt.NDArray[np.int32]  # [n], -1: none
    suffixes: bytes  # [n] places in IMAGE_SUFFIXES
    keys: bytes  # UTF-8, one after the other
    key_ends: npt.NDArray[np.int32]  # [n]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].decode("utf-8", "surrogateescape")


def frame_table(chunk: bytes | memoryview, *, where: str, labels: bool = True) -> FrameTable:
    """The samples of a chunk that have an image, in order.

    Args:
        chunk: whole tar members, with or without the archive's end mark.
        where: the chunk's name for messages.
        labels: False leaves the samples' own labels unread, and says that there are none.

    Raises:
        DataError: as `framer.frame`, and for a label that is no class, as `framer.label_of`.
    """
    chunk = bytes(chunk)
    members = plain_members(chunk)
    table = None if members is None else _table_of_plain(chunk, members, read_labels=labels)
    return table if table is not None else _table_of_frames(chunk, where=where, read_labels=labels)


def _table_of_plain(chunk: bytes, members: PlainMembers, *, read_labels: bool) -> FrameTable | None:
    """None if a name or a label is of a kind that is better looked at one by one."""
    names, data, sizes = members
    width = names.shape[1]
    columns = np.arange(width, dtype=np.uint8)
    if width > 2 and ((names[:, 0] == ord("_")) & (names[:, 1] == ord("_"))).any():
        return None  # maybe webdataset's own
    slash = names == ord("/")
    base = np.where(slash.any(axis=1), width - slash[:, ::-1].argmax(axis=1), 0) if slash.any() else 0
    dots = names == ord(".")
    if slash.any():
        dots &= columns >= np.reshape(base, (-1, 1))
    dot = dots.argmax(axis=1)
    if not (dots.any(axis=1) & (dot > base)).all():
        return None  # no suffix, or a hidden file
    padded = np.zeros((len(names), -(-width // 8) * 8), np.uint8)
    np.multiply(names, columns < dot[:, None], out=padded[:, :width])  # the keys

    # Consecutive members with one key are a sample.
    words = padded.view(np.uint64)
    begins = np.ones(len(words), bool)
    begins[1:] = (words[1:] != words[:-1]).any(axis=1)
    sample = np.cumsum(begins) - 1
    count = int(sample[-1]) + 1

    at = np.minimum(dot[:, None] + 1 + np.arange(_CODE_BYTES), width - 1)
    tail = np.take_along_axis(names, at, axis=1)
    tail = np.where((tail >= ord("A")) & (tail <= ord("Z")), tail | 0x20, tail)
    code = tail.astype(np.int64) @ _POWERS
    place = np.minimum(np.searchsorted(_CODES, code), len(_CODES) - 1)
    rows = np.flatnonzero(_CODES[place] == code)  # of the members whose suffix is known
    slots = _KINDS[place[rows]] * count + sample[rows]
    member = np.full((len(_SUFFIXES), count), -1)  # the row of each sample's member of each kind
    member.reshape(-1)[slots] = rows
    if not np.array_equal(member.reshape(-1)[slots], rows):
        return None  # a suffix that comes twice

    images = member[: len(IMAGE_SUFFIXES)]
    suffix = (images >= 0).argmax(axis=0)
    image = images[suffix, np.arange(count)]
    kept = np.flatnonzero(image >= 0)
    image, suffix = image[kept], suffix[kept]
    cls, json = (member[_SUFFIXES.index(kind)][kept] for kind in ("cls", "json"))
    if not read_labels:
        cls, json = np.full_like(cls, -1), np.full_like(json, -1)
    labels = _labels(chunk, data, sizes, cls=cls)
    if labels is None:
        return None
    for row in np.flatnonzero((cls < 0) & (json >= 0)).tolist():
        text = int(data[json[row]]), int(sizes[json[row]])
        try:
            labels[row] = label_of(chunk, Frame("", {"json": text}))
        except DataError:
            return None
    key_lengths = dot[image]
    return FrameTable(
        offsets=data[image],
        lengths=sizes[image],
        labels=labels.astype(np.int32),
        suffixes=suffix.astype(np.uint8).tobytes(),
        keys=names[image][columns < key_lengths[:, None]].tobytes(),
        key_ends=np.cumsum(key_lengths, dtype=np.int32),
    )


def _labels(
    chunk: bytes | memoryview,
    data: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    *,
    cls: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64] | None:
    """int64[n]: what the `.cls` members in rows `cls` say, -1 where there is none (row -1).

    None if one is not a few digits, with a newline at most.
    """
    labels = np.full(len(cls), -1, np.int64)
    has = np.flatnonzero(cls >= 0)
    starts, lengths = data[cls[has]], sizes[cls[has]]
    if len(has) == 0:
        return labels
    if lengths.min() < 1 or lengths.max() > _LABEL_DIGITS:
        return None
    width = int(lengths.max())
    text = np.frombuffer(chunk, np.uint8)[starts[:, None] + np.arange(width)]
    digits = lengths - (text[np.arange(len(text)), lengths - 1] == ord("\n"))
    used = np.arange(width) < digits[:, None]
    value = text.astype(np.int64) - ord("0")
    if digits.min() < 1 or not (((value >= 0) & (value <= 9)) | ~used).all():
        return None
    label = np.zeros(len(has), np.int64)
    for column in range(width):
        label = np.where(used[:, column], label * 10 + value[:, column], label)
    labels[has] = label
    return labels


def _table_of_frames(chunk: bytes, *, where: str, read_labels: bool) -> FrameTable:
    frames: list[Frame] = frame(chunk, where=where)
    try:
        labels = [label_of(chunk, sample) if read_labels else -1 for sample in frames]
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    images = [image_of(sample) or ("", 0, 0) for sample in frames]
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in frames]
    return FrameTable(
        offsets=np.array([offset for _, offset, _ in images], np.int64),
        lengths=np.array([length for _, _, length in images], np.int64),
        labels=np.array(labels, np.int32),
        suffixes=bytes(IMAGE_SUFFIXES.index(suffix) for suffix, _, _ in images),
        keys=b"".join(keys),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int32),
    )
