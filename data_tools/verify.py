"""Re-read a whole dataset and compare it with its index.

Compares every shard's size and sha256, every chunk's crc32, the samples' keys, labels and captions, the
class names, and looks at every image's header (--decode: decodes it). Names every difference; exit code 3 if
there is one. Labels that came from a table are compared with it if --labels names it, and not with the tars.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_tools import parts
from data_tools.compose import CLASSES_NAME, describe
from data_tools.contents import Layout, entry_of, opened
from data_tools.labels import LabelTable
from data_tools.parallel import check_processes, processes_for, report, run_tasks, task_storage
from data_tools.progress import Progress
from data_tools.scan import image_size
from data_tools.start import add_processes, wrong_if_unreachable
from pretrain.data.decode import decode
from pretrain.data.framer import Frame, cut_chunks, frame, image_of, labels_of
from pretrain.data.index import DatasetIndex, SampleTable, ShardEntry, open_index, open_samples
from pretrain.data.index_cache import default_cache_dir
from pretrain.errors import DataError, ObjectNotFoundError, StorageError
from pretrain.storage import Storage, open_storage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", metavar="URL", help="folder or s3://bucket/prefix with the shards and their index"
    )
    parser.add_argument("--decode", action="store_true", help="decode every image, not only its header")
    parser.add_argument("--labels", metavar="TABLE", help="the table that the index took its labels from")
    add_processes(parser)


@dataclass(frozen=True, kw_only=True)
class ShardCheck:
    """One shard to re-read."""

    url: str
    identity: str
    shard: int
    decode_images: bool


def run(args: argparse.Namespace) -> int:
    processes = check_processes(args.processes)
    index = open_index(args.url, cache_dir=default_cache_dir())
    storage = open_storage(args.url)
    opened.cache_clear()
    differences = 0
    total = int(index.shard_bytes.sum())
    with Progress(total=total, what="verifying", unit="B") as progress:
        for difference in find_differences(
            storage,
            index,
            decode_images=args.decode,
            labels=args.labels,
            processes=processes_for(processes, tasks=len(index.shard_names), total_bytes=total),
            progress=progress,
        ):
            print(difference, flush=True)
            differences += 1
    if differences:
        raise DataError(
            f"{args.url}: {differences} difference{'s' * (differences > 1)} from the index; "
            "fetch or pack the named shards again"
        )
    if index.labels_overridden and not args.labels:
        print("note: its labels came from a table, which --labels would compare them with", file=sys.stderr)
    print(f"{args.url}: all as the index says ({describe(index)})")
    return 0


def find_differences(
    storage: Storage,
    index: DatasetIndex,
    *,
    decode_images: bool,
    labels: str | None,
    processes: int,
    progress: Progress,
) -> Iterator[str]:
    """One line for each way in which the stored bytes are not what the index says."""
    with wrong_if_unreachable():
        stored = {info.name: info.size for info in storage.list() if parts.is_shard(info.name)}
    for name in sorted(set(stored) - set(index.shard_names)):
        if _holds_samples(storage, name):
            yield f"{name}: not in the index"
    yield from _class_name_differences(storage, index)
    try:
        samples = open_samples(index, cache_dir=default_cache_dir())
    except DataError as error:
        yield str(error)
    else:
        if labels is not None:
            yield from _table_differences(index, samples, labels)
    tasks = []
    for shard, name in enumerate(index.shard_names):
        size = int(index.shard_bytes[shard])
        if name not in stored:
            yield f"{name}: missing"
            progress.add(size)
            continue
        if stored[name] != size:
            yield f"{name}: {stored[name]} bytes, the index says {size}"
        tasks.append(
            ShardCheck(url=index.url, identity=index.identity, shard=shard, decode_images=decode_images)
        )
    for found in run_tasks(
        check_shard, tasks, processes=processes, progress=progress, preload=("data_tools.verify",)
    ):
        yield from found


def _holds_samples(storage: Storage, name: str) -> bool:
    """Tars without samples are left out of an index; what is damaged may hold some."""
    try:
        return next(cut_chunks(storage.stream(name), where=name, max_samples=1), None) is not None
    except StorageError:
        raise
    except DataError:
        return True


def _class_name_differences(storage: Storage, index: DatasetIndex) -> Iterator[str]:
    if index.class_names is None or not storage.exists(CLASSES_NAME):
        return
    names = tuple(line.strip() for line in storage.read(CLASSES_NAME).decode("utf-8", "replace").splitlines())
    if names == index.class_names:
        return
    for i in range(max(len(names), len(index.class_names))):
        ours, theirs = (some[i] if i < len(some) else None for some in (index.class_names, names))
        if ours != theirs:
            yield f"{CLASSES_NAME}: class {i} is {theirs!r}, the index says {ours!r}"
            return


def _table_differences(index: DatasetIndex, samples: SampleTable, url: str) -> Iterator[str]:
    table = LabelTable(url, index.class_names, partial=True)
    layout = Layout(index)
    for shard, name in enumerate(index.shard_names):
        mine = layout.samples(shard)
        entry = entry_of(index, samples, layout, shard)
        wanted = table.applied(entry)
        for row in np.flatnonzero(_unequal(wanted, entry)):
            key = samples.key(mine[int(row)])
            yield f"{name}: {key} has label {list(samples.label_set(mine[int(row)]))}, {url} says another"


def _unequal(a: ShardEntry, b: ShardEntry) -> np.ndarray:
    """bool[n]: whose labels differ."""
    if a.label_sets is None or b.label_sets is None:
        return np.asarray(a.labels) != np.asarray(b.labels)
    counts_differ = np.diff(a.label_sets.offsets) != np.diff(b.label_sets.offsets)
    x, y = (
        [sets.values[sets.offsets[i] : sets.offsets[i + 1]].tolist() for i in range(len(counts_differ))]
        for sets in (a.label_sets, b.label_sets)
    )
    return np.array([left != right for left, right in zip(x, y, strict=True)], bool)


def check_shard(task: ShardCheck) -> list[str]:
    """The differences of one shard. Reports bytes."""
    index, samples = opened(task.url, task.identity)
    storage = task_storage(task.url)
    found: list[str] = []
    try:
        found.extend(
            _shard_differences(storage, index, task.shard, samples=samples, decode_images=task.decode_images)
        )
    except ObjectNotFoundError:
        found.append(f"{index.shard_names[task.shard]}: went away while it was read")
    return found


def _shard_differences(
    storage: Storage, index: DatasetIndex, shard: int, *, samples: SampleTable | None, decode_images: bool
) -> Iterator[str]:
    name = index.shard_names[shard]
    layout = Layout(index)
    sha256 = hashlib.sha256()
    buffer = bytearray()  # the shard from offset `base` on, as far as it was read and is still needed
    base = captions = 0
    blocks = storage.stream(name)
    is_framed = True

    def more() -> bool:
        block = next(blocks, None)
        if block is None:
            return False
        sha256.update(block)
        report(len(block))
        buffer.extend(block)
        return True

    first = layout.samples(shard).start
    for chunk in layout.chunks(shard):
        offset, length = int(index.chunk_offset[chunk]), int(index.chunk_bytes[chunk])
        count = int(index.chunk_samples[chunk])
        where = f"{name}, chunk {chunk} (bytes {offset} to {offset + length})"
        while base + len(buffer) < offset + length and more():
            pass
        del buffer[: offset - base]
        base = max(base, offset)
        data = bytes(buffer[:length])
        frames = None
        if len(data) < length:
            yield f"{where}: cut short, {len(data)} of {length} bytes are there"
        else:
            crc32 = zlib.crc32(data)
            if crc32 != index.chunk_crc32[chunk]:
                yield f"{where}: crc32 {crc32:08x}, the index says {int(index.chunk_crc32[chunk]):08x}"
            try:
                frames = frame(data, where=where)
            except DataError as error:
                yield str(error)
        if frames is not None and len(frames) != count:
            yield f"{where}: {len(frames)} samples, the index says {count}"
            frames = None
        if frames is not None:
            captions += sum("txt" in sample.members for sample in frames)
            trusted = None if samples is None else (samples, first)
            yield from _chunk_differences(
                data, frames, index=index, where=where, samples=trusted, decode_images=decode_images
            )
        is_framed &= frames is not None
        first += count
    buffer.clear()
    while more():
        buffer.clear()
    if is_framed and captions != index.shard_captions[shard]:
        yield f"{name}: {captions} captions, the index says {int(index.shard_captions[shard])}"
    if sha256.digest() != index.shard_sha256[shard].tobytes():
        want = index.shard_sha256[shard].tobytes().hex()
        yield f"{name}: sha256 {sha256.hexdigest()}, the index says {want}"


def _chunk_differences(
    data: bytes,
    frames: list[Frame],
    *,
    index: DatasetIndex,
    where: str,
    samples: tuple[SampleTable, int] | None,
    decode_images: bool,
) -> Iterator[str]:
    for row, sample in enumerate(frames):
        if samples is not None:
            table, first = samples
            key = table.key(first + row)
            if sample.key != key:
                yield f"{where}: sample {row} is {sample.key!r}, the index says {key!r}"
            if not index.labels_overridden:
                try:
                    got, want = labels_of(data, sample), table.label_set(first + row)
                    if (got if isinstance(got, tuple) else (got,) * (got >= 0)) != want:
                        shown = list(want) if index.label_kind == "multi" else (*want, -1)[0]
                        yield f"{where}: {sample.key} has label {got}, the index says {shown}"
                except DataError as error:
                    yield f"{where}: {error}"
        image = image_of(sample)
        assert image is not None, "frame gave a sample without an image"
        suffix, offset, length = image
        if decode_images:
            try:
                decode(data[offset : offset + length], name=f"{sample.key}.{suffix}")
            except DataError as error:
                yield f"{where}: {error}"
        elif image_size(data[offset : offset + length]) is None:
            yield f"{where}: {sample.key}.{suffix} is neither JPEG, PNG nor WebP"
