"""Index WebDataset tars that were made elsewhere, so that they can be trained on.

Reads every tar directly under URL once, from beginning to end, and writes index.safetensors and
samples.safetensors beside them. The tars are not changed. Labels come from KEY.cls (an integer) or
from `label` in KEY.json (an integer, or a list of them); class names from --class-names, or from classes.txt
beside the tars.

--labels takes them from a table instead, CSV or Parquet with the columns key and label, as of a manifest for
`pretrain data pack`. Samples that it does not name are refused, or keep their own label with
--labels-partial; rows that name no sample are counted. Training then uses the index's labels.

Interrupted and run again, it goes on after the finished tars. On several machines --part 1/3, --part 2/3 and
--part 3/3 each read their share of the tars; when all are done, --merge, with the same --chunk-samples, makes
the index. --merge also ends a packing in parts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass

from data_tools import parts
from data_tools.compose import CLASSES_NAME, Composed, compose, describe, existing_identity, tell
from data_tools.labels import LabelTable
from data_tools.pack import index_packed, read_progress
from data_tools.parallel import check_processes, processes_for, report, run_tasks, task_storage
from data_tools.parts import parse_share
from data_tools.progress import Progress
from data_tools.scan import Findings, scan_shard
from data_tools.start import (
    add_chunk_samples,
    add_processes,
    check_chunk_samples,
    counted,
    parse_class_names,
    read_class_names,
    wrong_if_unreachable,
)
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import open_index
from pretrain.errors import DataError, ObjectNotFoundError, UsageError
from pretrain.storage import ObjectInfo, Storage, join_url, open_storage

INDEXING_VERSION = 2  # of what a part says for a given tar and options
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix with the tars")
    parser.add_argument("--class-names", metavar="FILE", help="one name a line, line i for label i")
    parser.add_argument("--labels", metavar="TABLE", help="take labels from this .csv or .parquet")
    parser.add_argument(
        "--labels-partial", action="store_true", help="samples that --labels does not name keep their own"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an index that says something else")
    add_chunk_samples(parser)
    add_processes(parser)
    parser.add_argument("--part", metavar="I/N", help="read only the I-th of N shares of the tars")
    parser.add_argument("--merge", action="store_true", help="make the index of parts that are all done")


@dataclass(frozen=True, kw_only=True)
class ScanTask:
    """One tar to read at `url`."""

    url: str
    info: ObjectInfo
    chunk_samples: int | None
    options: str
    share: str | None


def run(args: argparse.Namespace) -> int:
    chunk_samples = check_chunk_samples(args.chunk_samples)
    processes = check_processes(args.processes)
    share = parse_share(args.part)
    if share is not None and (args.merge or args.labels or args.class_names):
        raise UsageError("--part reads tars only; give --merge, --labels and --class-names when all are done")
    if args.labels_partial and not args.labels:
        raise UsageError("--labels-partial belongs to --labels")
    storage = open_storage(args.url)
    with wrong_if_unreachable():
        if args.merge and read_progress(storage) is not None:
            _refuse_for_packed(args)
            index_packed(storage, args.url)
            return 0
        parts.refuse_unfinished(storage, args.url)
        shards = find_shards(storage, args.url)
        names = None if share is not None else _class_names(storage, args)
        labels = LabelTable(args.labels, names, partial=args.labels_partial) if args.labels else None
    options = json.dumps({"indexing": INDEXING_VERSION, "chunk_samples": chunk_samples}, sort_keys=True)
    wanted = {
        shard.name: parts.part_name(shard.name, version=parts.version_of(storage, shard), options=options)
        for shard in shards
    }
    there = parts.present(storage)
    mine = shards if share is None else share.take(shards)
    todo = [shard for shard in mine if wanted[shard.name] not in there]
    if args.merge and todo:
        missing = [shard.name for shard in todo]
        raise parts.explain_missing(
            storage, args.url, missing, options=options, there=there, total=len(shards)
        )
    if len(todo) < len(mine) and not args.merge:
        print(f"{args.url}: going on after {len(mine) - len(todo)} of {len(mine)} tars", file=sys.stderr)
    tasks = (
        ScanTask(
            url=args.url,
            info=shard,
            chunk_samples=chunk_samples,
            options=options,
            share=None if share is None else str(share),
        )
        for shard in todo
    )
    total = sum(shard.size for shard in todo)
    used = processes_for(processes, tasks=len(todo), total_bytes=total)
    with Progress(total=total, what="indexing", unit="B") as progress:
        for _ in run_tasks(scan_one, tasks, processes=used, progress=progress, preload=("data_tools.index",)):
            pass
    if share is not None:
        print(f"{args.url}: part {share} is read; when all are, run `pretrain data index {args.url} --merge`")
        return 0
    composed = compose(
        storage,
        args.url,
        list(wanted.values()),
        class_names=names if labels is None else labels.class_names,
        chunk_rule=chunk_samples,
        labels=labels,
    )
    if labels is not None and labels.missing:
        print(
            f"note: {args.labels} has no row for {labels.missing} samples, which keep their own label "
            f"(the first: {labels.first_missing!r})",
            file=sys.stderr,
        )
    if labels is not None and labels.unused:
        print(f"note: {labels.unused} rows of {args.labels} name no sample here", file=sys.stderr)
    return _publish(storage, args.url, composed, overwrite=args.overwrite)


def _refuse_for_packed(args: argparse.Namespace) -> None:
    given = [o for o in ("labels", "class_names", "chunk_samples") if getattr(args, o) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option}: the packing that is merged here was begun with its own")


def _class_names(storage: Storage, args: argparse.Namespace) -> list[str] | None:
    if args.class_names:
        return read_class_names(args.class_names)
    if not storage.exists(CLASSES_NAME):
        return None
    text = storage.read(CLASSES_NAME).decode("utf-8", "replace")
    return parse_class_names(text, where=join_url(args.url, CLASSES_NAME))


def scan_one(task: ScanTask) -> None:
    """Read one tar and save its part. Reports bytes."""
    storage = task_storage(task.url)
    name = task.info.name
    findings = Findings()
    before = parts.version_of(storage, task.info)
    entry = scan_shard(
        storage.stream(name),
        name=name,
        where=join_url(task.url, name),
        chunk_samples=task.chunk_samples,
        findings=findings,
        on_bytes=report,
    )
    if entry.num_bytes != task.info.size or parts.version_of(storage, parts.look_up(storage, name)) != before:
        raise DataError(
            f"{join_url(task.url, name)}: {entry.num_bytes} bytes came, the listing says "
            f"{task.info.size}; is something still writing it?"
        )
    part = parts.Part(entry=entry, findings=findings, options=task.options, share=task.share)
    parts.save(storage, part)


def _publish(storage: Storage, url: str, composed: Composed, *, overwrite: bool) -> int:
    index = composed.index
    tell(composed.findings, index)
    existing = existing_identity(storage, url)
    if existing == index.identity:
        parts.clear(storage)
        held = open_index(url)
        if not _holds(storage, held.samples_name, held.samples_sha256):
            storage.put(held.samples_name, composed.samples_file)
            print(f"{url}: {held.samples_name} was damaged or missing and is made again ({describe(index)})")
            return 0
        print(f"{url}: the index is up to date ({describe(index)})")
        return 0
    if existing is not None and not overwrite:
        raise UsageError(
            f"{url}: there is an index already, and it says something else (identity {existing[:12]}, "
            f"now {index.identity[:12]}); give --overwrite to replace it"
        )
    composed.put(storage)
    parts.clear(storage)
    print(f"{url}: indexed {describe(index)}")
    return 0


def _holds(storage: Storage, name: str, sha256: str) -> bool:
    """Whether an object is there with that content."""
    digest = hashlib.sha256()
    try:
        for block in storage.stream(name):
            digest.update(block)
    except ObjectNotFoundError:
        return False
    return digest.hexdigest() == sha256


def find_shards(storage: Storage, url: str) -> list[ObjectInfo]:
    """The tars directly under the root, sorted by name. UsageError, saying what is there, if none is."""
    shards, deeper, compressed, images, others = [], set(), 0, 0, 0
    for info in storage.list():
        folder, slash, _ = info.name.partition("/")
        if parts.is_shard(info.name):
            shards.append(info)
        elif slash and info.name.lower().endswith(".tar"):
            deeper.add(folder)
        compressed += info.name.lower().endswith(COMPRESSED)
        images += info.name.lower().rpartition(".")[2] in IMAGE_SUFFIXES
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
    if not others:
        raise UsageError(f"{url}: there is nothing there; check the path or URL")
    if images:
        raise UsageError(
            f"{url}: no .tar files there, but {counted(images, 'image')}; make shards of them with "
            f"`pretrain data pack {url} OUT`"
        )
    raise UsageError(
        f"{url}: no .tar files there ({counted(others, 'other file')}); give the place that holds the shards"
    )
