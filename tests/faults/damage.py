"""Damaged shards: what can be wrong with a tar, and what becomes of it, here and in plain webdataset.

Called by test_tar_damage.py and damage_table.py. Each case damages the middle one of three indexed shards, and
then a whole epoch is trained on, the dataset is verified, and an index is made of the damaged shard alone.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import random
import shutil
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset
from data.tiny_shards import jpeg

from pretrain.cli import main
from pretrain.data.augment import TrainTransform
from pretrain.data.index import open_index
from pretrain.data.loader import TrainLoader
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream
from pretrain.errors import PretrainError

SHARDS, PER_SHARD, CHUNK_SAMPLES, B = 3, 40, 8, 12
COUNT = SHARDS * PER_SHARD
BLOCK = 512
DAMAGED = "shard-0001.tar"

Damage = Callable[[bytes], bytes]


def shard(number: int) -> bytes:
    """40 samples of an image and a label, as `wds.TarWriter` writes them."""
    file = io.BytesIO()
    with webdataset.TarWriter(file, mtime=0.0) as writer:
        for i in range(number * PER_SHARD, (number + 1) * PER_SHARD):
            writer.write({"__key__": f"s{i:05d}", "jpg": jpeg(i), "cls": str(i % 10).encode()})
    return file.getvalue()


@dataclass(frozen=True)
class Layout:
    """Where members begin, in bytes: header, data, end (whole blocks)."""

    members: list[tuple[int, int, int]]
    end: int  # of the last member: the end mark stands here

    @classmethod
    def of(cls, tar: bytes) -> Layout:
        with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
            infos = archive.getmembers()
        members = [(i.offset, i.offset_data, i.offset_data + -(-i.size // BLOCK) * BLOCK) for i in infos]
        return cls(members, members[-1][2])


def header(tar: bytes, number: int, change: Callable[[tarfile.TarInfo], None]) -> bytes:
    """The tar with the header of that member written anew, with a right checksum, after `change`."""
    start = Layout.of(tar).members[number][0]
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        info = archive.getmembers()[number]
    change(info)
    return tar[:start] + info.tobuf(format=tarfile.USTAR_FORMAT) + tar[start + BLOCK :]


def _named() -> dict[str, Damage]:
    """What disks, copies, writers and people do to tars."""

    def at(number: int, part: int) -> Callable[[bytes], int]:
        return lambda tar: Layout.of(tar).members[number][part]

    half = 2 * (PER_SHARD // 2)  # the members of the sample that the second half begins with
    label, image = half, half + 1

    def cut(where: Callable[[bytes], int], more: int = 0) -> Damage:
        return lambda tar: tar[: where(tar) + more]

    def put(where: Callable[[bytes], int], data: bytes, *, over: bool = True) -> Damage:
        def damage(tar: bytes) -> bytes:
            place = where(tar)
            return tar[:place] + data + tar[place + (len(data) if over else 0) :]

        return damage

    def flip(where: Callable[[bytes], int], more: int = 0) -> Damage:
        def damage(tar: bytes) -> bytes:
            place = where(tar) + more
            return tar[:place] + bytes([tar[place] ^ 0x10]) + tar[place + 1 :]

        return damage

    def sized(size: int) -> Damage:
        return lambda tar: header(tar, image, lambda info: setattr(info, "size", size))

    def renamed(name: str) -> Damage:
        return lambda tar: header(tar, image, lambda info: setattr(info, "name", name))

    def without(first: int, last: int) -> Damage:
        return lambda tar: tar[: at(first, 0)(tar)] + tar[at(last, 2)(tar) :]

    def swapped(tar: bytes) -> bytes:
        first, second, end = at(half, 0)(tar), at(half + 2, 0)(tar), at(half + 3, 2)(tar)
        return tar[:first] + tar[second:end] + tar[first:second] + tar[end:]

    def doubled(tar: bytes) -> bytes:
        start, end = at(half, 0)(tar), at(half + 1, 2)(tar)
        return tar[:end] + tar[start:end] + tar[end:]

    def base256(tar: bytes) -> bytes:
        start = at(image, 0)(tar)
        block = bytearray(tar[start : start + BLOCK])
        block[124:136] = struct.pack(">B3xQ", 0x80, 1 << 60)
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return tar[:start] + bytes(block) + tar[start + BLOCK :]

    return {
        "cut inside an image": cut(at(image, 1), 100),
        "cut inside a header": cut(at(half, 0), 100),
        "cut between two members of a sample": cut(at(image, 0)),
        "cut between samples": cut(at(half, 0)),
        "cut between samples, end mark added": lambda tar: cut(at(half, 0))(tar) + bytes(2 * BLOCK),
        "cut off the end mark": lambda tar: tar[: Layout.of(tar).end],
        "empty file": lambda tar: b"",
        "one byte left": lambda tar: tar[:1],
        "only an end mark": lambda tar: bytes(10240),
        "nothing but zeros": lambda tar: bytes(len(tar)),
        "an end mark in the middle": put(at(half, 0), bytes(2 * BLOCK)),
        "an end mark slipped in": put(at(half, 0), bytes(2 * BLOCK), over=False),
        "one zero block in a header's place": put(at(half, 0), bytes(BLOCK)),
        "a page of zeros": put(at(image, 1), bytes(4096)),
        "a bit flipped in an image": flip(at(image, 1), 200),
        "a bit flipped in a label": flip(at(label, 1)),
        "a bit flipped in a name": flip(at(half, 0), 3),
        "a bit flipped in a checksum": flip(at(half, 0), 150),
        "a bit flipped in the padding": flip(at(image, 2), -1),
        "a bit flipped in a time": flip(at(half, 0), 140),
        "a bit flipped in the end mark": flip(lambda tar: Layout.of(tar).end, 700),
        "a size too large": sized(1 << 30),
        "a size too small": sized(10),
        "a size of nothing": sized(0),
        "a size of 2**60 in base 256": base256,
        "a key changed": renamed("other.jpg"),
        "a suffix changed": renamed(f"s{PER_SHARD + PER_SHARD // 2:05d}.bak"),
        "a name without a dot": renamed("noname"),
        "a sample taken out": without(half, half + 1),
        "an image taken out": without(image, image),
        "a label taken out": without(label, label),
        "a sample twice": doubled,
        "two samples in each other's place": swapped,
        "random bytes in a header's place": put(at(half, 0), random.Random(1).randbytes(BLOCK)),
        "two tars in one file": lambda tar: tar + shard(0),
        "bytes after the end": lambda tar: tar + b"trailing",
        "zeros after the end": lambda tar: tar + bytes(512),
        "compressed": lambda tar: gzip.compress(tar, mtime=0),
        "an error page of a proxy": lambda tar: b"<html><body>503 Service Unavailable</body></html>",
        "random bytes": lambda tar: random.Random(2).randbytes(len(tar)),
        "another shard's bytes": lambda tar: shard(2),
    }


def _generated(count: int = 40, seed: int = 2024) -> dict[str, Damage]:
    """Flipped, cut, spliced, doubled and zeroed at places drawn from a seed."""
    draw = random.Random(seed)
    cases: dict[str, Damage] = {}
    for number in range(count):
        kind = ("flip", "cut", "splice", "double", "zero")[number % 5]
        where, length = draw.random(), draw.choice((1, 100, BLOCK, 3 * BLOCK, 5000))
        aligned, bit = draw.random() < 0.5, 1 << draw.randrange(8)

        def damage(tar: bytes, kind=kind, where=where, length=length, aligned=aligned, bit=bit) -> bytes:  # type: ignore[no-untyped-def]
            place = int(where * (len(tar) - 1))
            if aligned:
                place -= place % BLOCK
            piece = tar[place : place + length]
            if kind == "flip":
                return tar[:place] + bytes([tar[place] ^ bit]) + tar[place + 1 :]
            if kind == "cut":
                return tar[:place]
            if kind == "splice":
                return tar[:place] + tar[place + length :]
            if kind == "double":
                return tar[:place] + piece + tar[place:]
            return tar[:place] + bytes(len(piece)) + tar[place + length :]

        size = "" if kind in ("flip", "cut") else f" {length} bytes"
        cases[f"#{number}: {kind}{size} at {where:.3f}{' (block)' if aligned else ''}"] = damage
    return cases


CASES: dict[str, Damage] = {**_named(), **_generated()}


@dataclass(frozen=True)
class Outcome:
    """What became of one case. Words are those of the table."""

    changed: bool  # does the file differ at all
    training: str  # "refused", "harmless", "replaced N" or "SILENT LOSS"
    training_said: str
    verify: str  # "named" or "as indexed"
    verify_said: str
    indexing: str  # of the damaged tar alone: "refused", or the number of samples that it is said to hold
    indexing_said: str
    webdataset: str  # how many samples of the 40 it gave, and what it raised


class Bench:
    """Three sound shards with their index, in `folder`, to be damaged again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sound").mkdir(parents=True)
        for number in range(SHARDS):
            (folder / "sound" / f"shard-{number:04d}.tar").write_bytes(shard(number))
        code, said = command("data", "index", folder / "sound", "--chunk-samples", CHUNK_SAMPLES)
        assert code == 0, said
        self.sound = (folder / "sound" / DAMAGED).read_bytes()
        self.reference, _ = epoch(folder / "sound")

    def run(self, damage: Damage) -> Outcome:
        data = damage(self.sound)
        work, alone = self.folder / "work", self.folder / "alone"
        for path in (work, alone):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.folder / "sound", work)
        (work / DAMAGED).write_bytes(data)
        alone.mkdir()
        (alone / DAMAGED).write_bytes(data)
        training, training_said = self._train(work)
        verified, verify_said = command("data", "verify", work)
        indexed, indexing_said = command("data", "index", alone, "--chunk-samples", CHUNK_SAMPLES)
        samples = str(open_index(str(alone)).num_samples) if indexed == 0 else "refused"
        return Outcome(
            changed=data != self.sound,
            training=training,
            training_said=training_said,
            verify="named" if verified == 3 else "as indexed" if verified == 0 else f"exit {verified}",
            verify_said=verify_said,
            indexing=samples,
            indexing_said=indexing_said,
            webdataset=plain_webdataset(work / DAMAGED),
        )

    def _train(self, folder: Path) -> tuple[str, str]:
        try:
            seen, replaced = epoch(folder)
        except PretrainError as error:
            return "refused" if error.exit_code == 3 else f"exit {error.exit_code}", str(error)
        if len(seen) != COUNT:
            return "SILENT LOSS", f"{len(seen)} positions"
        different = {g for g in seen if seen[g] != self.reference[g]}
        if different - set(replaced):
            return "SILENT LOSS", f"other pixels at {sorted(different - set(replaced))}"
        return (f"replaced {len(replaced)}", str(replaced)) if replaced else ("harmless", "")


def epoch(folder: Path) -> tuple[dict[int, tuple[int, str]], dict[int, str]]:
    """(position -> label and digest of its pixels, position -> key that was replaced) of a whole epoch."""
    index = open_index(str(folder))
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(Order(chunk_samples=index.chunk_samples, seed=7, lanes=4, block_chunks=2)),
        transform=TrainTransform(image_size=8),
        seed=7,
        global_batch_size=B,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=0,
    )
    seen, replaced = {}, {}
    for micro_batches in islice(loader.steps(0), COUNT // B):
        replaced |= {line.g: line.key for line in loader.replaced()}
        for batch in micro_batches:
            for i in np.flatnonzero(batch["weights"].numpy()).tolist():
                digest = hashlib.sha256(batch["images"][i].numpy().tobytes()).hexdigest()
                seen[int(batch["positions"][i])] = int(batch["labels"][i]), digest
    loader.close()
    return seen, replaced


def plain_webdataset(path: Path) -> str:
    """What `wds.WebDataset(path)` with its defaults makes of it: samples with image and label, and the end."""
    count, end = 0, "no error"
    try:
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            count += "jpg" in sample and "cls" in sample
    except Exception as error:
        end = type(error).__name__
    return f"{count} of {PER_SHARD}, {end}"


def command(*words: object) -> tuple[int, str]:
    """(exit code, what it said) of a `pretrain` command, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in words])
    return code, said.getvalue()
