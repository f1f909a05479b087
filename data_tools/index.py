"""Index WebDataset tars that were made elsewhere, so that they can be trained on.

Reads every tar directly under URL once, from beginning to end, and writes index.safetensors and
samples.safetensors beside them. The tars are not changed. Labels come from KEY.cls (an integer) or
from `label` in KEY.json; class names from --class-names, or from classes.txt beside the tars.
"""

from __future__ import annotations

import argparse
import sys

from data_tools.progress import Progress
from data_tools.scan import Findings, scan_shard
from data_tools.start import (
    add_chunk_samples,
    check_chunk_samples,
    parse_class_names,
    read_class_names,
    wrong_if_unreachable,
)
from pretrain.data.index import INDEX_NAME, DatasetIndex, IndexBuilder, open_index, write_index
from pretrain.errors import DataError, UsageError
from pretrain.storage import ObjectInfo, Storage, join_url, open_storage

CLASSES_NAME = "classes.txt"
PROGRESS_NAME = "pack-progress.json"  # there while `pretrain data pack` has not finished
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix with the tars")
    parser.add_argument("--class-names", metavar="FILE", help="one name a line, line i for label i")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that says something else")
    add_chunk_samples(parser)


def run(args: argparse.Namespace) -> int:
    chunk_samples = check_chunk_samples(args.chunk_samples)
    storage = open_storage(args.url)
    with wrong_if_unreachable():
        if storage.exists(PROGRESS_NAME):
            raise UsageError(
                f"{args.url}: `pretrain data pack` has not finished here; run it again as before, it goes on"
            )
        shards = find_shards(storage, args.url)
        if args.class_names:
            class_names: list[str] | None = read_class_names(args.class_names)
        elif storage.exists(CLASSES_NAME):
            where = join_url(args.url, CLASSES_NAME)
            class_names = parse_class_names(
                storage.read(CLASSES_NAME).decode("utf-8", "replace"), where=where
            )
        else:
            class_names = None

    builder = IndexBuilder(class_names=class_names)
    findings = Findings()
    with Progress(total=sum(shard.size for shard in shards), what="indexing", unit="B") as progress:
        for shard in shards:
            entry = scan_shard(
                storage.stream(shard.name),
                name=shard.name,
                where=join_url(args.url, shard.name),
                chunk_samples=chunk_samples,
                findings=findings,
                on_bytes=progress.add,
            )
            if entry.num_bytes != shard.size:
                raise DataError(
                    f"{join_url(args.url, shard.name)}: {entry.num_bytes} bytes came, the listing says "
                    f"{shard.size}; is something still writing it?"
                )
            builder.add_shard(entry)
    index, index_file, samples_file = builder.finish(args.url)
    tell(findings, index)
    existing = _existing_identity(storage, args.url)
    if existing == index.identity:
        print(f"{args.url}: the index is up to date ({describe(index)})")
        return 0
    if existing is not None and not args.overwrite:
        raise UsageError(
            f"{args.url}: there is an index already, and it says something else (identity {existing[:12]}, "
            f"now {index.identity[:12]}); give --overwrite to replace it"
        )
    write_index(storage, index_file, samples_file)
    print(f"{args.url}: indexed {describe(index)}")
    return 0


def find_shards(storage: Storage, url: str) -> list[ObjectInfo]:
    """The tars directly under the root, sorted by name. UsageError, saying what is there, if none is."""
    shards, deeper, compressed, others = [], set(), 0, 0
    for info in storage.list():
        folder, slash, _ = info.name.partition("/")
        if info.name.lower().endswith(".tar"):
            if slash:
                deeper.add(folder)
            else:
                shards.append(info)
        compressed += info.name.lower().endswith(COMPRESSED)
        others += 1
    if shards:
        return shards
    if deeper:
        names = ", ".join(sorted(deeper)[:5])
        raise UsageError(f"{url}: no tars directly in it, but in {names}; index each of these on its own")
    if compressed:
        raise UsageError(
            f"{url}: its {compressed} tars are compressed, so chunks cannot be read out of them; unpack them"
        )
    raise UsageError(
        f"{url}: no .tar files there ({others} other files); give the place that holds the shards"
    )


def describe(index: DatasetIndex) -> str:
    classes = "no labels" if index.num_classes is None else f"{index.num_classes} classes"
    return (
        f"{index.num_samples} samples, {classes}, {len(index.shard_names)} shards, "
        f"{index.num_chunks} chunks, {int(index.shard_bytes.sum()) / 1e6:.1f} MB"
    )


def tell(findings: Findings, index: DatasetIndex) -> None:
    """Print what a user should know about an index that was made."""
    if findings.without_image:
        print(
            f"note: {len(findings.without_image)} entries have no image and are no samples "
            f"(the first: {findings.without_image[0]})",
            file=sys.stderr,
        )
    if findings.unreadable:
        print(
            f"warning: {len(findings.unreadable)} images are neither JPEG, PNG nor WebP, "
            f"training would stop there (the first: {findings.unreadable[0]})",
            file=sys.stderr,
        )
    if index.labels_sorted:
        print(
            "warning: the samples lie sorted by label; training shuffles over a window of chunks only, "
            "so pack them again with `pretrain data pack`, which shuffles",
            file=sys.stderr,
        )


def _existing_identity(storage: Storage, url: str) -> str | None:
    if not storage.exists(INDEX_NAME):
        return None
    try:
        return open_index(url).identity
    except (DataError, UsageError):  # damaged, or of another version: not the one we would write
        return "unreadable"
