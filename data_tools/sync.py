"""Copy an indexed dataset: between folders and buckets, in any direction.

SRC and DST are folders or s3://bucket/prefix. Every shard's sha256 is held against SRC's index on its way.
What DST holds already, with the right size and digest, is not copied again; interrupted and run again, it
goes on. The index comes last: DST is never listed as a dataset before it is whole. Into a place that holds
another dataset, or an older version of this one, shards that both have are kept.

DST gets the shards, the index, the samples file and classes.txt, and loses nothing, unless --delete removes
the shards that SRC's index does not list.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from data_tools import parts
from data_tools.compose import CLASSES_NAME, describe
from data_tools.progress import Progress
from data_tools.start import counted, refuse_a_file, wrong_if_unreachable
from pretrain.data.index import INDEX_NAME, DatasetIndex, open_index
from pretrain.data.index_format import parse_index
from pretrain.errors import DataError, UsageError
from pretrain.storage import ObjectInfo, Storage, join_url, open_storage

PROGRESS_NAME = "sync-progress.json"
FOLDER = "sync-parts"  # at DST: a mark for each shard that is right; its name says which version of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="folder or s3://bucket/prefix with shards and their index")
    parser.add_argument("dst", metavar="DST", help="folder or s3://bucket/prefix")
    parser.add_argument(
        "--delete", action="store_true", help="remove shards of DST that SRC's index does not list"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace shards of DST that have other bytes under the same name",
    )
    parser.add_argument(
        "--threads", type=int, default=8, help="shards under way at a time (default %(default)s)"
    )


class _Stopped(BaseException):
    """In a thread: the rest is not wanted any more."""


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.threads <= 256:
        raise UsageError(f"--threads {args.threads}: from 1 to 256 is possible")
    source, target = open_storage(args.src), open_storage(args.dst)
    if source.url == target.url:
        raise UsageError(f"{args.dst}: SRC and DST are one place")
    with wrong_if_unreachable():
        parts.refuse_unfinished(source, args.src)
        open_index(args.src)  # says in words what is wrong
        index_file = source.read(INDEX_NAME)
        index = parse_index(source.url, np.frombuffer(index_file, np.uint8))
        refuse_a_file(target, args.dst)
        parts.refuse_unfinished(target, args.dst, but=PROGRESS_NAME)
        there = {info.name: info for info in target.list()}
    known = _known_digests(target, args.dst, there)
    right, wrong = _sort_out(index, there, known)
    if wrong and not args.overwrite:
        raise _other_bytes(args.dst, wrong)
    _begin(target, index, replacing=bool(wrong))
    copier = _Copier(source, target, index, there=there, known=right, overwrite=args.overwrite)
    total = int(index.shard_bytes.sum())
    with Progress(total=total, what=f"copying to {args.dst}", unit="B") as progress:
        copier.run(progress, threads=args.threads)
    _finish(source, target, index, index_file)
    extra = sorted({name for name in there if parts.is_shard(name)} - set(index.shard_names))
    if args.delete:
        for name in extra:
            target.delete(name)
    elif extra:
        print(
            f"note: {counted(len(extra), 'shard')} there not of this dataset (--delete removes such)",
            file=sys.stderr,
        )
    for name in there:
        if name.startswith("samples") and name.endswith(".safetensors") and name != index.samples_name:
            target.delete(name)  # of the index that was replaced
    print(
        f"{args.dst}: {describe(index)}; {counted(copier.copied, 'shard')} copied, "
        f"{len(index.shard_names) - copier.copied} were there"
    )
    return 0


def _known_digests(target: Storage, url: str, there: dict[str, ObjectInfo]) -> dict[str, bytes]:
    """sha256 of shards as an index that lies at DST says; none if there is no good one."""
    if INDEX_NAME not in there:
        return {}
    try:
        index = open_index(url)
    except (DataError, UsageError):
        return {}
    return {
        name: index.shard_sha256[i].tobytes()
        for i, name in enumerate(index.shard_names)
        if name in there and there[name].size == index.shard_bytes[i]
    }


def _sort_out(
    index: DatasetIndex, there: dict[str, ObjectInfo], known: dict[str, bytes]
) -> tuple[set[str], list[str]]:
    """(shards that are right as DST's own index says, those that certainly have other bytes there)."""
    right, wrong = set(), []
    for i, name in enumerate(index.shard_names):
        if known.get(name) == index.shard_sha256[i].tobytes():
            right.add(name)
        elif name in known or (name in there and there[name].size != index.shard_bytes[i]):
            wrong.append(name)
    return right, wrong


def _begin(target: Storage, index: DatasetIndex, *, replacing: bool) -> None:
    if replacing:  # what is there is about to be no dataset any more
        target.delete(INDEX_NAME)
    target.put(PROGRESS_NAME, json.dumps({"identity": index.identity}).encode())


def _finish(source: Storage, target: Storage, index: DatasetIndex, index_file: bytes) -> None:
    """Copy what is not a shard, the index last, and remove the marks."""
    if source.exists(CLASSES_NAME):
        target.put(CLASSES_NAME, source.read(CLASSES_NAME))
    with tempfile.TemporaryDirectory(prefix="pretrain-sync-") as folder:
        path = Path(folder) / "samples"
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for block in source.stream(index.samples_name):
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != index.samples_sha256:
            raise DataError(
                f"{join_url(source.url, index.samples_name)}: sha256 {digest.hexdigest()}, the index says "
                f"{index.samples_sha256}; run `pretrain data verify {source.url}`"
            )
        target.put(index.samples_name, path)
    target.put(INDEX_NAME, index_file)
    with ThreadPoolExecutor(parts.THREADS) as pool:
        list(pool.map(target.delete, [info.name for info in target.list(f"{FOLDER}/")]))
    marks = target.local_path(FOLDER)
    if marks is not None and marks.is_dir() and not any(marks.iterdir()):
        marks.rmdir()
    target.delete(PROGRESS_NAME)


def _other_bytes(url: str, names: list[str]) -> UsageError:
    return UsageError(
        f"{url}: {counted(len(names), 'shard')} there with other bytes under the same name (the first: {names[0]}); "
        "give another place, or --overwrite"
    )


class _Copier:
    """Brings DST's shards up to the index, many at a time."""

    def __init__(
        self,
        source: Storage,
        target: Storage,
        index: DatasetIndex,
        *,
        there: dict[str, ObjectInfo],
        known: set[str],
        overwrite: bool,
    ) -> None:
        self._source, self._target, self._index = source, target, index
        self._there, self._known, self._overwrite = there, known, overwrite
        self._marks = {name for name in there if name.startswith(f"{FOLDER}/")}
        self._stop = threading.Event()
        self.copied = 0

    def run(self, progress: Progress, *, threads: int) -> None:
        """Copy what is missing. Raises what a copy raises, after the others were stopped."""
        waiting: set[Future[bool]] = set()
        sizes: dict[Future[bool], int] = {}
        left = iter(range(len(self._index.shard_names)))
        with ThreadPoolExecutor(threads) as pool:
            try:
                while True:
                    while len(waiting) < 2 * threads and (shard := next(left, None)) is not None:
                        future = pool.submit(self._bring, shard)
                        sizes[future] = int(self._index.shard_bytes[shard])
                        waiting.add(future)
                    if not waiting:
                        return
                    finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in finished:
                        self.copied += future.result()
                        progress.add(sizes.pop(future))
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _watched(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            if self._stop.is_set():
                raise _Stopped
            yield block

    def _mark(self, name: str, digest: bytes, info: ObjectInfo | None) -> str:
        version = parts.version_of(self._target, info)
        return f"{FOLDER}/{name}.{hashlib.sha256(version.encode() + digest).hexdigest()[:24]}"

    def _bring(self, shard: int) -> bool:
        """Make one shard right; False if it was."""
        name, size = self._index.shard_names[shard], int(self._index.shard_bytes[shard])
        digest = self._index.shard_sha256[shard].tobytes()
        held = self._there.get(name)
        if held is not None and held.size == size:
            mark = self._mark(name, digest, held)
            if name in self._known or mark in self._marks:
                return False
            if self._digest(self._target, name) == digest:  # another tool's copy, or one of a killed run
                self._target.put(mark, b"right")
                return False
        if held is not None and not self._overwrite:
            raise _other_bytes(self._target.url, [name])
        self._copy(name, size, digest)
        self._target.put(self._mark(name, digest, parts.look_up(self._target, name)), b"right")
        return True

    def _digest(self, storage: Storage, name: str) -> bytes:
        digest = hashlib.sha256()
        for block in self._watched(storage.stream(name)):
            digest.update(block)
        return digest.digest()

    def _copy(self, name: str, size: int, digest: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="pretrain-sync-") as folder:
            path = self._source.local_path(name)
            if path is not None:
                got = self._digest(self._source, name)
            else:
                path, hashed = Path(folder) / "shard", hashlib.sha256()
                with open(path, "wb") as file:
                    for block in self._watched(self._source.stream(name)):
                        hashed.update(block)
                        file.write(block)
                got = hashed.digest()
            if got != digest:
                raise DataError(
                    f"{join_url(self._source.url, name)}: sha256 {got.hex()}, the index says {digest.hex()}; "
                    f"run `pretrain data verify {self._source.url}`"
                )
            self._target.put(name, path)
        is_local = self._target.local_path(name) is not None
        # A store checks what it is sent; a disk, or a mount, does not.
        if self._target.size(name) != size or (is_local and self._digest(self._target, name) != digest):
            raise DataError(f"{join_url(self._target.url, name)}: is not what was written; check the store")
