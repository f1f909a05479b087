"""Pack images into shuffled, indexed WebDataset shards.

SRC is a folder with a folder for each class (or images alone: no labels), a tar of such a folder, or a
CSV or Parquet manifest. SRC and OUT are local, or s3://bucket/prefix. Images are stored as they are, unless
--max-side shrinks them. What comes out depends on the images and the options alone, byte for byte.

A manifest has the column path, and may have
  label     a class name or an integer; several labels as a|b in a CSV (| for none), as a list in Parquet:
            kept in KEY.json as integers
  key       of the sample (default: the path without its suffix)
  caption   kept in KEY.txt
and any others, which are kept in KEY.json. Parquet needs `pip install 'vit-pretrain[parquet]'`.

Interrupted and run again with the same options, it goes on after the finished shards. On several machines
with a place that all of them write to, --part 1/3, --part 2/3 and --part 3/3 each pack their share; when all
are done, `pretrain data index OUT --merge` makes the index (of OUT/train and OUT/val after --val-fraction).
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from data_tools import parts
from data_tools.compose import CLASSES_NAME, compose, describe, tell
from data_tools.parallel import check_processes, processes_for, run_tasks
from data_tools.parts import Share, parse_share
from data_tools.plans import Options, Plan, make_plans, shard_name
from data_tools.progress import Progress
from data_tools.shard_writer import ShardTask, write_shard
from data_tools.sources import find_images
from data_tools.start import (
    add_chunk_samples,
    add_processes,
    check_chunk_samples,
    read_class_names,
    refuse_a_file,
    wrong_if_unreachable,
)
from pretrain.data.index import INDEX_NAME, open_index
from pretrain.errors import DataError, UsageError
from pretrain.storage import Storage, open_storage

PROGRESS_NAME = "pack-progress.json"  # there while packing has not finished: what is being packed
_SHARD_NAME = re.compile(r"\d{6,}\.tar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="image folder, tar of one, or CSV or Parquet manifest")
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
    add_processes(parser)
    parser.add_argument(
        "--threads",
        type=int,
        default=4,
        help="of a process, that read and check images (default %(default)s)",
    )
    parser.add_argument("--part", metavar="I/N", help="pack only the I-th of N shares of the shards")


def run(args: argparse.Namespace) -> int:
    if args.max_side is not None and args.max_side < 8:
        raise UsageError(f"--max-side {args.max_side}: at least 8 pixels")
    if args.shard_bytes < 1 << 10:
        raise UsageError(f"--shard-bytes {args.shard_bytes}: at least 1024")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UsageError(f"--val-fraction {args.val_fraction}: between 0 and 1")
    if not 1 <= args.threads <= 256:
        raise UsageError(f"--threads {args.threads}: from 1 to 256 is possible")
    share = parse_share(args.part)
    if share is not None and args.overwrite:
        raise UsageError(
            "--part and --overwrite: other machines may be writing there; empty OUT yourself first"
        )
    options = Options(
        max_side=args.max_side,
        shard_bytes=args.shard_bytes,
        chunk_samples=check_chunk_samples(args.chunk_samples),
        seed=args.seed,
        skip_bad=args.skip_bad,
    )
    processes = check_processes(args.processes)
    names = read_class_names(args.class_names) if args.class_names else None
    with find_images(args.src, class_names=names) as images:
        for note in images.notes:
            print(f"note: {note}", file=sys.stderr)
        plans = make_plans(images, args.out, options, args.val_fraction)
        if open_storage(args.src).url in [open_storage(plan.url).url for plan in plans]:
            raise UsageError(f"{args.out}: SRC and OUT are one place; give another for the shards")
        stores = [open_storage(plan.url) for plan in plans]
        with wrong_if_unreachable():  # before anything is written anywhere
            states = [
                _look_at(store, plan, overwrite=args.overwrite, alone=share is None)
                for store, plan in zip(stores, plans, strict=True)
            ]
        for store, plan, state in zip(stores, plans, states, strict=True):
            if state == "finished":
                store.delete(PROGRESS_NAME)
                print(f"{plan.url}: finished already ({describe(open_index(plan.url))})")
                continue
            if state in ("new", "lenient"):
                _begin(store, plan, share, clear=state == "new")
            _write_shards(store, plan, share, processes=processes, threads=args.threads)
            if share is None:
                index_packed(store, plan.url)
            else:
                print(
                    f"{plan.url}: part {share} is packed; "
                    f"when all are, run `pretrain data index {plan.url} --merge`"
                )
    return 0


def _look_at(storage: Storage, plan: Plan, *, overwrite: bool, alone: bool) -> str:
    """Is OUT "finished", "resumable" or "new"? UsageError if it holds what is not ours to replace.

    "lenient": resumable, now with --skip-bad, which it was begun without.
    alone: no other machine packs here.
    """
    refuse_a_file(storage, plan.url)
    parts.refuse_unfinished(storage, plan.url, but=PROGRESS_NAME)
    progress = read_progress(storage)
    tars = {info.name for info in storage.list() if parts.is_shard(info.name)}
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
    elif progress is not None and progress["options"] == _fingerprint(plan) and plan.options.skip_bad:
        return "lenient"
    elif progress is not None and alone and not overwrite and (done := len(parts.present(storage))):
        raise UsageError(
            f"{plan.url}: a packing of other images or options has not finished here ({done} of "
            f"{progress['shards']} shards are); run that one again to go on with it, or give --overwrite to replace it"
        )
    foreign = sorted(tars - ours)
    if foreign:
        raise UsageError(
            f"{plan.url}: holds {len(foreign)} tars that no index lists ({foreign[0]}); give another place, "
            "or move them away"
        )
    return "new"


def read_progress(storage: Storage) -> dict | None:
    """What PROGRESS_NAME holds; None where no packing was begun."""
    if not storage.exists(PROGRESS_NAME):
        return None
    progress = json.loads(storage.read(PROGRESS_NAME))
    assert isinstance(progress, dict), f"{PROGRESS_NAME} is written whole or not at all"
    return progress


def _begin(storage: Storage, plan: Plan, share: Share | None, *, clear: bool) -> None:
    """Note what is being packed; `clear`: and remove what a former packing left."""
    progress = {
        "plan": plan.digest,
        "options": _fingerprint(plan),
        "shards": len(plan.shards),
        "class_names": plan.class_names,
        "num_classes": plan.num_classes,
        "chunk_samples": plan.options.chunk_samples,
    }
    data = json.dumps(progress).encode()
    if share is None or not clear:
        if clear:
            _clear(storage)
        storage.put(PROGRESS_NAME, data)
        return
    # Other machines begin as well. What is there of another packing is not ours to remove under them.
    former = read_progress(storage)
    if former is None and storage.put_if_absent(PROGRESS_NAME, data):
        return
    former = read_progress(storage)
    if former is None or former["plan"] != plan.digest:
        raise UsageError(
            f"{storage.url}: a packing of other images or options was begun here; all parts need the same ones. "
            "Empty the place to begin anew"
        )


def _clear(storage: Storage) -> None:
    """Remove what a former packing left, the index first, so that no index ever lists what is gone."""
    # `_look_at` made sure that all tars here are ours to replace.
    samples_name = None
    if storage.exists(INDEX_NAME):
        try:
            samples_name = open_index(storage.url).samples_name
        except (DataError, UsageError):
            samples_name = None
        storage.delete(INDEX_NAME)
    for info in list(storage.list()):
        is_ours = info.name in (samples_name, CLASSES_NAME) or info.name.startswith("samples.safetensors")
        if ("/" not in info.name and is_ours) or parts.is_shard(info.name):
            storage.delete(info.name)
    parts.clear(storage)
    storage.delete(PROGRESS_NAME)


def _fingerprint(plan: Plan) -> str:
    return json.dumps(
        {"pack": plan.if_all_decode, "chunk_samples": plan.options.chunk_samples}, sort_keys=True
    )


def _write_shards(
    storage: Storage, plan: Plan, share: Share | None, *, processes: int | None, threads: int
) -> None:
    """Write the shards of this machine's share that are not there yet."""
    fingerprint = _fingerprint(plan)
    numbers = list(range(len(plan.shards)))
    mine = numbers if share is None else share.take(numbers)
    there = parts.present(storage)
    versions = _versions(storage)
    todo = [number for number in mine if _part_of(versions, number, fingerprint) not in there]
    if len(todo) < len(mine):
        print(f"{plan.url}: going on after {len(mine) - len(todo)} of {len(mine)} shards", file=sys.stderr)
    tasks = (
        ShardTask(
            url=plan.url,
            name=shard_name(number),
            images=plan.shards[number],
            options=plan.options,
            fingerprint=fingerprint,
            share=None if share is None else str(share),
            threads=threads,
        )
        for number in todo
    )
    images = [image for number in todo for image in plan.shards[number]]
    used = processes_for(processes, tasks=len(todo), total_bytes=sum(image.size for image in images))
    with Progress(total=len(images), what=f"packing {plan.url}", unit="images") as bar:
        for _ in run_tasks(write_shard, tasks, processes=used, progress=bar, preload=_PRELOAD):
            pass


_PRELOAD = ("data_tools.shard_writer",)


def _versions(storage: Storage) -> dict[str, str]:
    """Version of each tar there, by one listing."""
    return {
        info.name: parts.version_of(storage, info)
        for info in storage.list()
        if _SHARD_NAME.fullmatch(info.name)
    }


def _part_of(versions: dict[str, str], number: int, fingerprint: str) -> str:
    name = shard_name(number)
    # A shard of which no image decodes is not written; its part says so.
    return parts.part_name(name, version=versions.get(name, "not there"), options=fingerprint)


def index_packed(storage: Storage, url: str) -> None:
    """Make the index of a packing of which all parts are done, and remove what was kept for it.

    Raises:
        UsageError: a shard is missing, was made otherwise, or nothing is being packed here.
        DataError: as `IndexBuilder.finish`.
    """
    progress = read_progress(storage)
    if progress is None:
        raise UsageError(
            f"{url}: another command that packs into the same place ended this packing meanwhile; give each its own "
            "OUT, or share one packing by --part"
        )
    there, versions, fingerprint = parts.present(storage), _versions(storage), progress["options"]
    wanted = [_part_of(versions, number, fingerprint) for number in range(progress["shards"])]
    missing = [number for number, name in enumerate(wanted) if name not in there]
    if missing:
        names = [shard_name(number) for number in missing]
        raise parts.explain_missing(
            storage, url, names, options=fingerprint, there=there, total=progress["shards"]
        )
    composed = compose(
        storage,
        url,
        wanted,
        class_names=progress["class_names"],
        num_classes=progress["num_classes"],
        plan=progress["plan"],
        chunk_rule=progress["chunk_samples"],
    )
    if progress["class_names"] is not None:
        storage.put(CLASSES_NAME, "".join(f"{name}\n" for name in progress["class_names"]).encode())
    composed.put(storage)
    storage.delete(PROGRESS_NAME)
    parts.clear(storage)
    tell(composed.findings, composed.index, packed=True)
    print(f"{url}: packed {describe(composed.index)}")
