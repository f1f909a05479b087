"""Pack images into shuffled, indexed WebDataset shards.

SRC is a folder with a folder for each class (or images alone: no labels), a tar of such a folder, or a
CSV manifest with the columns path, label (a class name or an integer) and key, of which only path is
needed. SRC and OUT are local, or s3://bucket/prefix. Images are stored as they are, unless --max-side
shrinks them. What comes out depends on the images and the options alone, byte for byte.

Interrupted and run again with the same options, it goes on after the last finished shard.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_tools.index import CLASSES_NAME, PROGRESS_NAME, describe, tell
from data_tools.progress import Progress
from data_tools.scan import Findings, scan_shard
from data_tools.sources import ImageSet, Source, find_images
from data_tools.start import (
    add_chunk_samples,
    check_chunk_samples,
    read_class_names,
    refuse_a_file,
    wrong_if_unreachable,
)
from pretrain.data.decode import Picture
from pretrain.data.index import (
    INDEX_NAME,
    SAMPLES_NAME,
    IndexBuilder,
    ShardEntry,
    open_index,
    write_index,
)
from pretrain.errors import DataError, UsageError
from pretrain.storage import Storage, join_url, open_storage

PACK_VERSION = 1  # of what the bytes of a shard are for given images and options
JPEG_QUALITY = 92
_SHARD_NAME = re.compile(r"\d{6,}\.tar")
TAR_OVERHEAD_BYTES = 512 + 1024 + 511  # a sample's second header, its label's blocks, padding at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="image folder, tar of one, or CSV manifest")
    parser.add_argument("out", metavar="OUT", help="folder or s3://bucket/prefix for the shards")
    parser.add_argument(
        "--max-side", type=int, metavar="PIXELS", help="shrink images with a longer side to it"
    )
    parser.add_argument(
        "--shard-bytes", type=int, default=256 << 20, metavar="BYTES", help="about this much of SRC a shard"
    )
    add_chunk_samples(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle (default %(default)s)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="write OUT/train and OUT/val, with about this share of the images, chosen by their keys, in val",
    )
    parser.add_argument(
        "--class-names", metavar="FILE", help="one name a line, for a manifest's integer labels"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out what does not decode, and count it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another dataset that OUT holds")
    parser.add_argument(
        "--threads", type=int, default=4, help="that read and check images (default %(default)s)"
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    max_side: int | None
    shard_bytes: int
    chunk_samples: int | None
    seed: int
    skip_bad: bool


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One dataset to write: which images in which shard. The digest says all that its bytes depend on."""

    url: str
    shards: list[list[Source]]
    class_names: list[str] | None
    num_classes: int | None
    options: Options
    digest: str


def run(args: argparse.Namespace) -> int:
    if args.max_side is not None and args.max_side < 8:
        raise UsageError(f"--max-side {args.max_side}: at least 8 pixels")
    if args.shard_bytes < 1 << 10:
        raise UsageError(f"--shard-bytes {args.shard_bytes}: at least 1024")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UsageError(f"--val-fraction {args.val_fraction}: between 0 and 1")
    if not 1 <= args.threads <= 256:
        raise UsageError(f"--threads {args.threads}: from 1 to 256 is possible")
    options = Options(
        max_side=args.max_side,
        shard_bytes=args.shard_bytes,
        chunk_samples=check_chunk_samples(args.chunk_samples),
        seed=args.seed,
        skip_bad=args.skip_bad,
    )
    names = read_class_names(args.class_names) if args.class_names else None
    with find_images(args.src, class_names=names) as images:
        for note in images.notes:
            print(f"note: {note}", file=sys.stderr)
        plans = _make_plans(images, args.out, options, args.val_fraction)
        stores = [open_storage(plan.url) for plan in plans]
        with wrong_if_unreachable():  # before anything is written anywhere
            states = [
                _look_at(store, plan, overwrite=args.overwrite)
                for store, plan in zip(stores, plans, strict=True)
            ]
        for store, plan, state in zip(stores, plans, states, strict=True):
            if state == "finished":
                store.delete(PROGRESS_NAME)
                print(f"{plan.url}: finished already ({describe(open_index(plan.url))})")
            else:
                _write(store, plan, resume=state == "resumable", threads=args.threads)
    return 0


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def _make_plans(images: ImageSet, out: str, options: Options, val_fraction: float | None) -> list[Plan]:
    if val_fraction is None:
        return [_make_plan(images.images, images, out, options)]
    # By key, and not by seed: an image stays on its side whatever is added or shuffled.
    parts: dict[str, list[Source]] = {"train": [], "val": []}
    for image in images.images:
        parts["val" if _hash(f"validation {image.key}") < val_fraction * 2**64 else "train"].append(image)
    for part, found in parts.items():
        if not found:
            raise UsageError(
                f"--val-fraction {val_fraction} leaves none of {len(images.images)} images for {part}; "
                "take another fraction"
            )
    return [_make_plan(found, images, join_url(out, part), options) for part, found in parts.items()]


def _make_plan(part: list[Source], images: ImageSet, url: str, options: Options) -> Plan:
    shuffled = sorted(part, key=lambda image: (_hash(f"{options.seed} {image.key}"), image.key))
    shards: list[list[Source]] = []
    filled = options.shard_bytes
    for image in shuffled:
        needed = image.size + TAR_OVERHEAD_BYTES
        if filled + needed > options.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(image)
        filled += needed
    what = hashlib.sha256()
    settings = {**vars(options), "version": PACK_VERSION, "class_names": images.class_names}
    what.update(json.dumps(settings, sort_keys=True).encode())
    for image in shuffled:
        line = json.dumps([image.key, image.suffix, image.label, image.size])
        what.update(line.encode())
    highest = max(image.label for image in images.images)
    return Plan(
        url=url,
        shards=shards,
        class_names=images.class_names,
        num_classes=highest + 1 if highest >= 0 else None,
        options=options,
        digest=what.hexdigest(),
    )


def _shard_name(number: int) -> str:
    return f"{number:06d}.tar"


def _look_at(storage: Storage, plan: Plan, *, overwrite: bool) -> str:
    """Is OUT "finished", "resumable" or "new"? UsageError if it holds what is not ours to replace."""
    refuse_a_file(storage, plan.url)
    progress = _read_progress(storage)
    tars = {info.name for info in storage.list() if info.name.endswith(".tar") and "/" not in info.name}
    ours = {name for name in tars if _SHARD_NAME.fullmatch(name)} if overwrite or progress else set()
    if storage.exists(INDEX_NAME):
        try:
            index = open_index(plan.url)
            if index.plan == plan.digest:
                return "finished"
            ours |= set(index.shard_names)
        except (DataError, UsageError):
            pass  # damaged: surely not the dataset that we would write
        if not overwrite:
            raise UsageError(
                f"{plan.url}: holds a finished dataset made of other images or options; give --overwrite to "
                "replace it, or another place"
            )
    elif progress is not None and progress["plan"] == plan.digest:
        return "resumable"
    foreign = sorted(tars - ours)
    if foreign:
        raise UsageError(
            f"{plan.url}: holds {len(foreign)} tars that no index lists ({foreign[0]}); give another place, "
            "or move them away"
        )
    return "new"


def _read_progress(storage: Storage) -> dict | None:
    if not storage.exists(PROGRESS_NAME):
        return None
    progress = json.loads(storage.read(PROGRESS_NAME))
    assert isinstance(progress, dict), f"{PROGRESS_NAME} is written whole or not at all"
    return progress


def _clear(storage: Storage) -> None:
    """Remove what a former packing left, the index first, so that no index ever lists what is gone."""
    # `_look_at` made sure that all tars here are ours to replace.
    for name in (INDEX_NAME, SAMPLES_NAME, CLASSES_NAME):
        storage.delete(name)
    for info in list(storage.list()):
        if info.name.endswith(".tar") and "/" not in info.name:
            storage.delete(info.name)
    storage.delete(PROGRESS_NAME)


def _write(storage: Storage, plan: Plan, *, resume: bool, threads: int) -> None:
    done: dict[str, dict] = {}
    if resume:
        progress = _read_progress(storage)
        assert progress is not None, "resumable without progress"
        done = progress["shards"]
        print(f"{plan.url}: going on after {len(done)} of {len(plan.shards)} shards", file=sys.stderr)
    else:
        _clear(storage)
        _save_progress(storage, plan, done)
    builder = IndexBuilder(class_names=plan.class_names, num_classes=plan.num_classes, plan=plan.digest)
    findings = Findings()
    skipped: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pretrain-pack-")))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # on Ctrl-C, do not finish the queue
        total = sum(map(len, plan.shards))
        bar = stack.enter_context(Progress(total=total, what=f"packing {plan.url}", unit="images"))
        for number, images in enumerate(plan.shards):
            name = _shard_name(number)
            entry = _kept_shard(storage, plan, name, done.get(name), findings)
            if entry is None:
                path = folder / name
                bad = _write_tar(path, images, plan.options, pool, bar)
                entry = _scan_file(path, name, plan, findings)
                assert len(entry.keys) == len(images) - len(bad), f"{name}: wrote and read back other counts"
                if entry.keys:
                    storage.put(name, path)
                path.unlink()
                done[name] = {"bytes": entry.num_bytes, "sha256": entry.sha256.hex(), "skipped": bad}
                _save_progress(storage, plan, done)
            else:
                bar.add(len(images))
            skipped += done[name]["skipped"]
            if entry.keys:
                builder.add_shard(entry)
    index, index_file, samples_file = builder.finish(plan.url)
    if plan.class_names is not None:
        storage.put(CLASSES_NAME, "".join(f"{name}\n" for name in plan.class_names).encode())
    write_index(storage, index_file, samples_file)
    storage.delete(PROGRESS_NAME)
    tell(findings, index)
    if skipped:
        print(
            f"note: {len(skipped)} images do not decode and are left out:",
            *skipped[:20],
            sep="\n  ",
            file=sys.stderr,
        )
    print(f"{plan.url}: packed {describe(index)}")


def _save_progress(storage: Storage, plan: Plan, done: dict[str, dict]) -> None:
    storage.put(PROGRESS_NAME, json.dumps({"plan": plan.digest, "shards": done}).encode())


def _kept_shard(
    storage: Storage, plan: Plan, name: str, record: dict | None, findings: Findings
) -> ShardEntry | None:
    """A shard that a former run finished, read again; None if it has to be written."""
    if record is None or not storage.exists(name) or storage.size(name) != record["bytes"]:
        return None
    try:
        entry = scan_shard(
            storage.stream(name),
            name=name,
            where=join_url(plan.url, name),
            chunk_samples=plan.options.chunk_samples,
            findings=findings,
        )
    except DataError:
        return None
    return entry if entry.sha256.hex() == record["sha256"] else None


def _scan_file(path: Path, name: str, plan: Plan, findings: Findings) -> ShardEntry:
    with open(path, "rb") as file:
        return scan_shard(
            iter(lambda: file.read(8 << 20), b""),
            name=name,
            where=join_url(plan.url, name),
            chunk_samples=plan.options.chunk_samples,
            findings=findings,
        )


def _write_tar(
    path: Path, images: list[Source], options: Options, pool: ThreadPoolExecutor, bar: Progress
) -> list[str]:
    """Write one shard to a local file. Returns what was left out as bad."""
    # Here and not above: importing webdataset imports torch, which takes longer than all the checks.
    from webdataset import TarWriter

    bad: list[str] = []
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for image, data in _prepared(images, options, pool):
            if isinstance(data, DataError):
                if not options.skip_bad:
                    raise DataError(f"{data} (--skip-bad leaves such images out)") from data
                bad.append(str(data))
            else:
                sample: dict[str, str | bytes] = {"__key__": image.key, image.suffix: data}
                if image.label >= 0:
                    sample["cls"] = str(image.label).encode()
                writer.write(sample)
            bar.add(1)
    return bad


def _prepared(
    images: list[Source], options: Options, pool: ThreadPoolExecutor
) -> Iterator[tuple[Source, bytes | DataError]]:
    """Images in order, read and checked a few ahead by the pool's threads."""
    waiting: deque[tuple[Source, Future[bytes | DataError]]] = deque()
    ahead = 64
    for image in images:
        waiting.append((image, pool.submit(_prepare, image, options.max_side)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _prepare(image: Source, max_side: int | None) -> bytes | DataError:
    """The bytes to store; or, as a value, why the image is bad. Other errors are raised."""
    data = image.read()
    try:
        picture = Picture(data, name=image.shown_as)
        pixels = picture.pixels()  # all of it: what does not decode here would stop a training run
    except DataError as error:
        return error
    if max_side is None or max(picture.size) <= max_side:
        return data
    return _shrink(data, pixels, max_side)


def _shrink(data: bytes, upright: Image.Image, max_side: int) -> bytes:
    """`upright` with its longer side `max_side`, in the file format that `data` has."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as stored:
        kind = stored.format or "JPEG"
    scale = max_side / max(upright.size)
    width, height = (max(1, round(side * scale)) for side in upright.size)
    small = upright.resize((width, height), Image.Resampling.BICUBIC)  # antialiased when it shrinks
    file = io.BytesIO()
    small.save(file, kind, **({} if kind == "PNG" else {"quality": JPEG_QUALITY}))
    return file.getvalue()
