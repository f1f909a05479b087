"""What is fuzzed: functions that read bytes from outside. Each takes bytes and returns, or fails with a finding.

Only DataError and UsageError may come out of the project's readers. Where webdataset, or Python's tarfile,
accepts the same bytes, it must find the same in them.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data.tiny_shards import jpeg, write_dataset
from PIL import Image
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.decode import Picture
from pretrain.data.framer import IMAGE_SUFFIXES, KNOWN_SUFFIXES, cut_chunks, frame, label_of
from pretrain.data.index import INDEX_NAME, SAMPLES_NAME, open_index, open_samples
from pretrain.data.tar import list_members
from pretrain.errors import DataError, UsageError

BLOCK = 512
MAX_BYTES = 1 << 16  # of an input: enough for a few members of every kind
REFUSED = (DataError, UsageError)

Samples = list[tuple[str, dict[str, bytes]]]


def fuzz_frame(data: bytes) -> None:
    try:
        frames = frame(data, where="fuzz")
    except REFUSED:
        return
    ours = [(f.key, {s: data[at : at + size] for s, (at, size) in f.members.items()}) for f in frames]
    for found in frames:
        for at, size in found.members.values():
            assert 0 <= at <= at + size <= len(data), f"{found.key}: {at}+{size} of {len(data)} bytes"
        try:
            label = label_of(data, found)
        except REFUSED:
            continue
        np.array([label], np.int32)  # what the reader holds it in
    theirs = by_webdataset(data)
    if theirs is not None:
        assert ours == theirs, f"we read {summary(ours)}, webdataset {summary(theirs)}"


def fuzz_cut_chunks(data: bytes) -> None:
    """A shard read as a stream, in pieces of any size: the samples of `frame`, none split, none lost."""
    piece = 1 + (data[0] << 4 if data else 0)
    pieces = (data[at : at + piece] for at in range(0, len(data), piece))
    try:
        chunks = list(cut_chunks(pieces, where="fuzz", target_bytes=4096, min_samples=1, max_samples=3))
    except REFUSED:
        return
    ours: Samples = []
    for chunk in chunks:
        assert data[chunk.offset :].startswith(chunk.data), "a chunk is not where it says"
        try:
            frames = frame(chunk.data, where="fuzz")
        except REFUSED:
            return  # a suffix twice: found where the chunk is read
        assert frames, "a chunk without a sample"
        for f in frames:
            ours.append((f.key, {s: chunk.data[at : at + size] for s, (at, size) in f.members.items()}))
    theirs = by_webdataset(data)
    if theirs is not None:
        assert ours == theirs, f"we cut {summary(ours)}, webdataset reads {summary(theirs)}"


def fuzz_list_members(data: bytes) -> None:
    pieces = (data[at : at + 700] for at in range(0, len(data), 700))
    try:
        ours = list(list_members(pieces, where="fuzz"))
    except REFUSED:
        return
    theirs = by_tarfile(data)
    if theirs is not None:
        assert ours == theirs, f"we list {ours[:5]}, tarfile {theirs[:5]}"


def fuzz_index(data: bytes) -> None:
    """The first byte says which of the two files the rest is."""
    folder, index_file, samples_file = index_files()
    as_index = not data or data[0] % 2 == 0
    (folder / INDEX_NAME).write_bytes(data[1:] if as_index else index_file)
    (folder / SAMPLES_NAME).write_bytes(samples_file if as_index else data[1:])
    try:
        index = open_index(str(folder))
        table = open_samples(index)
        keys = [table.key(i) for i in range(min(index.num_samples, 200))]
    except REFUSED:
        return
    assert as_index or data[1:] == samples_file, "a samples file that the index does not name was accepted"
    assert len(index.chunk_shard) == len(index.chunk_samples), "columns of different lengths"
    assert index.num_samples == int(index.chunk_samples.sum(dtype=np.int64)), "samples that no chunk holds"
    assert len(table.labels) >= len(keys)


def fuzz_image(data: bytes) -> None:
    try:
        picture = Picture(data, name="fuzz", max_pixels=1 << 22)
        image = picture.pixels(at_least=(16, 16))
    except REFUSED:
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= 1 << 22


def by_webdataset(data: bytes) -> Samples | None:
    """What webdataset reads, without samples that have no image; None where it does not read to the end."""
    if not ends_as_a_tar(data) or tarfile_misreads(data):
        return None
    source = [{"url": "fuzz.tar", "stream": io.BytesIO(data)}]
    samples: Samples = []
    try:
        for sample in group_by_keys(tar_file_expander(source)):
            members = {suffix: value for suffix, value in sample.items() if suffix in KNOWN_SUFFIXES}
            if any(suffix in members for suffix in IMAGE_SUFFIXES):
                samples.append((sample["__key__"], members))
    except Exception:
        return None
    return samples


def by_tarfile(data: bytes) -> list[tuple[str, int, int]] | None:
    if tarfile_misreads(data) or not ends_as_a_tar(data):
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            return [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
    except Exception:
        return None


def tarfile_misreads(data: bytes) -> bool:
    """Is there a header whose name tarfile would put a prefix before, though it is not of the kind that has one
    (where POSIX headers hold the prefix, GNU's hold times), or has no name to put it before?
    """
    blocks = (data[at : at + BLOCK] for at in range(0, len(data) - BLOCK + 1, BLOCK))
    return any(block[345] and (block[257:263] != b"ustar\0" or not block[0]) for block in blocks)


def ends_as_a_tar(data: bytes) -> bool:
    """tarfile stops without a word at damage: only where it says how far it came can its list be believed."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            archive.getmembers()
            at = archive.offset
    except Exception:
        return False
    return not data[at:].strip(b"\0")


def summary(samples: Samples) -> list[tuple[str, list[str]]]:
    return [(key, sorted(members)) for key, members in samples[:5]]


# Structure-aware changes: without them nothing gets past a checksum.


def repair_tar(data: bytes, draw: random.Random) -> bytes:
    """Give what looks like a header a right checksum; now and then cut to whole blocks and end with a mark."""
    fixed = bytearray(data)
    for at in range(0, len(fixed) - BLOCK + 1, BLOCK):
        block = fixed[at : at + BLOCK]
        if block[257:262] == b"ustar" and draw.random() < 0.95:
            block[148:156] = b" " * 8
            block[148:156] = f"{sum(block):06o}\0 ".encode()
            fixed[at : at + BLOCK] = block
    if draw.random() < 0.5:
        del fixed[len(fixed) - len(fixed) % BLOCK :]
        fixed += bytes(2 * BLOCK)
    return bytes(fixed)


_NAMES = b"a.jpg a.cls b/a.PNG ../x.jpg __x__/a.jpg a .jpg a.b.jpg \xff\xfe.jpg".split()
_SIZES = [
    b"00000000000\0",
    b"00000001000\0",
    b"77777777777\0",
    b"\x80" + bytes(10) + b"\x05",
    b"\xff" * 12,
    b"9",
]
_ENTRIES = [[0, 0], [8, 0], [-8, 8], [0, 2**62], ["a"], "I64", "F32", [-1], [2**40], None, [1, 1]]


def change_tar(data: bytes, draw: random.Random) -> bytes:
    """One change of whole blocks, or of one field of one header."""
    if len(data) < BLOCK:
        return data
    at = draw.randrange(len(data) // BLOCK) * BLOCK
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at] + data[at + BLOCK * draw.randrange(1, 4) :]
    if kind == 1:
        source = draw.randrange(len(data) // BLOCK) * BLOCK
        return data[:at] + data[source : source + BLOCK * draw.randrange(1, 4)] + data[at:]
    if kind == 2:
        return data[:at] + bytes(BLOCK) + data[at + BLOCK :]
    start, end, values = draw.choice(
        [
            (0, 100, _NAMES),
            (124, 136, _SIZES),
            (156, 157, [bytes([value]) for value in b"01234567xgLKSDVX\0"]),
            (257, 265, [b"ustar\x0000", b"ustar  \0", b"ustar\0\0\0", b"ustar\x0001"]),
            (345, 500, [b"prefix", b"a/b", b"\0" * 155]),
        ]
    )
    value = draw.choice(values)
    field = value + bytes(end - start - len(value))
    return data[: at + start] + field[: end - start] + data[at + end :]


def change_index(data: bytes, draw: random.Random) -> bytes:
    """Change one property of the index's header and give it a right checksum again."""
    try:
        (size,) = struct.unpack("<Q", data[1:9])
        header = json.loads(data[9 : 9 + size])
        key, stored = next(iter(header["__metadata__"].items()))
        properties = json.loads(stored.partition(" ")[2])
        odd = [None, -1, 0, 1, 2**63, 2**70, 1.5, "", "x", [], {}, [1], True, "nan"]
        if draw.random() < 0.5:
            properties[draw.choice(sorted(properties))] = draw.choice(odd)
        else:
            column = header[draw.choice([name for name in header if name != "__metadata__"])]
            what = draw.choice(["dtype", "shape", "data_offsets"])
            column[what] = draw.choice(
                [[0, 0], [8, 0], [-8, 8], [0, 2**62], ["a"], "I64", "F32", [-1], [2**40], None, [1, 1]]
            )
        text = json.dumps(properties, sort_keys=True)
        header["__metadata__"][key] = f"{hashlib.sha256(text.encode()).hexdigest()} {text}"
        new = json.dumps(header).encode()
        new += b" " * (-len(new) % 8)
        return data[:1] + struct.pack("<Q", len(new)) + new + data[9 + size :]
    except Exception:
        return data


# Seeds.


@cache
def index_files() -> tuple[Path, bytes, bytes]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-index-")) / "d"
    write_dataset(folder, count=30, per_shard=10, chunk_samples=4)
    return folder, (folder / INDEX_NAME).read_bytes(), (folder / SAMPLES_NAME).read_bytes()


def tar_seeds() -> list[bytes]:
    seeds = []
    contents = [(f"s{i}", {"jpg": b"image" * i, "cls": b"%d" % i, "json": b'{"label": 1}'}) for i in range(4)]
    for mtime in (0.0, 1.5):  # webdataset writes PAX times for the second
        file = io.BytesIO()
        with TarWriter(file, mtime=mtime) as writer:
            for key, members in contents:
                writer.write({"__key__": key, **members})
        seeds.append(file.getvalue())
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
            for name in (
                "a/b.jpg",
                "d" * 90 + "/" + "x" * 60 + ".png",
                "a/b.cls",
                "é.webp",
                "link.jpg",
                "dir",
            ):
                info = tarfile.TarInfo(name)
                info.size = 700
                if name in ("link.jpg", "dir"):
                    info.size, info.type = 0, tarfile.SYMTYPE if name == "link.jpg" else tarfile.DIRTYPE
                tar.addfile(info, io.BytesIO(b"7" * info.size))
        seeds.append(file.getvalue())
    return seeds


def index_seeds() -> list[bytes]:
    _, index_file, samples_file = index_files()
    return [b"\0" + index_file, b"\1" + samples_file]


def image_seeds() -> list[bytes]:
    seeds = [jpeg(1)]
    picture = Image.open(io.BytesIO(jpeg(2)))
    for mode, kind, options in (
        ("RGB", "PNG", {}),
        ("P", "PNG", {}),
        ("LA", "PNG", {}),
        ("I;16", "PNG", {}),
        ("RGBA", "WEBP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("L", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
    ):
        file = io.BytesIO()
        picture.convert("L" if mode == "I;16" else mode).convert(mode).save(file, kind, **options)
        seeds.append(file.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    return [*seeds, file.getvalue()]


def nothing(data: bytes, draw: random.Random) -> bytes:
    return data


class Target(NamedTuple):
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    change: Callable[[bytes, random.Random], bytes]  # along the format
    repair: Callable[[bytes, random.Random], bytes]


TARGETS = {
    "frame": Target(fuzz_frame, tar_seeds, change_tar, repair_tar),
    "cut_chunks": Target(fuzz_cut_chunks, tar_seeds, change_tar, repair_tar),
    "list_members": Target(fuzz_list_members, tar_seeds, change_tar, repair_tar),
    "index": Target(fuzz_index, index_seeds, change_index, nothing),
    "image": Target(fuzz_image, image_seeds, nothing, nothing),
}
