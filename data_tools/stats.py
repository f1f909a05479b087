"""Count and show what a dataset holds.

Prints samples, shards, bytes, image sizes of those looked at, how many samples each class has, and keys that
several samples share. From a bucket it reads the index, the samples file (both kept in the cache folder) and a
few chunks. --sheet draws some of the images, with their class names, into one picture to look at.

--near-duplicates VAL reads all images of both datasets and prints which of VAL's are, nearly, in URL too: by
perceptual hash, alike if at most --near-bits of 64 differ. --write-keys writes URL's keys of these pairs to a
file for `pretrain data redact --keys` or `pretrain data-change --exclude`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.near_duplicates import alike, check_library, hash_dataset, shard_names_of
from data_tools.parallel import check_processes
from data_tools.scan import image_size
from data_tools.sheet import draw_sheet
from data_tools.start import add_processes, wrong_if_unreachable
from pretrain.data.framer import frame, image_of
from pretrain.data.index import DatasetIndex, SampleTable, open_index, open_samples
from pretrain.data.index_cache import default_cache_dir
from pretrain.data.keys import repeated
from pretrain.errors import UsageError
from pretrain.storage import Storage, open_storage

CHUNKS_LOOKED_AT = 12  # spread evenly: enough to see, and little to fetch from a bucket
BAR_WIDTH = 40
CLASSES_SHOWN = 30
PAIRS_SHOWN = 20
MOST_NEAR_BITS = 16  # of 64: beyond, unrelated pictures agree
_BLOCK_ROWS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Look:
    """One image that was looked at. `labels` is empty without labels."""

    key: str
    labels: tuple[int, ...]
    data: bytes
    size: tuple[int, int] | None  # (width, height) in pixels; None: not an image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix with shards and their index")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet")
    parser.add_argument("--images", type=int, default=80, help="on the sheet (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--near-duplicates", metavar="VAL", help="an indexed validation set to compare with")
    parser.add_argument(
        "--near-bits", type=int, default=4, metavar="N", help="of 64 may differ (default %(default)s)"
    )
    parser.add_argument("--write-keys", metavar="FILE", help="URL's keys of near-duplicates, one a line")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.images <= 2000:
        raise UsageError(f"--images {args.images}: from 1 to 2000 is possible")
    if not 0 <= args.near_bits <= MOST_NEAR_BITS:
        raise UsageError(f"--near-bits {args.near_bits}: from 0 to {MOST_NEAR_BITS} is possible")
    if args.write_keys and not args.near_duplicates:
        raise UsageError("--write-keys belongs to --near-duplicates")
    processes = check_processes(args.processes)
    if args.near_duplicates:
        check_library()
    index = open_index(args.url, cache_dir=default_cache_dir())
    val = open_index(args.near_duplicates, cache_dir=default_cache_dir()) if args.near_duplicates else None
    with wrong_if_unreachable():
        samples = open_samples(index, cache_dir=default_cache_dir())
        looks = _look(open_storage(args.url), index, samples)
    counts = _count_labels(index, samples)
    summary = _summary(index, counts, looks)
    summary["repeated_keys"] = _repeated_keys(index, samples)
    if val is not None:
        summary["near_duplicates"] = _near_duplicates(index, samples, val, args, processes)
    if args.sheet:
        _write_sheet(Path(args.sheet), _choose(looks, args.images), index)
    if args.json:
        print(json.dumps(summary))
        return 0
    _print_table(index, counts, summary)
    _print_pairs(summary)
    if args.sheet:
        print(f"contact sheet: {args.sheet}")
    return 0


def _count_labels(index: DatasetIndex, samples: SampleTable) -> np.ndarray | None:
    """int64[classes]: samples that have each label; None without labels. Memory: a block."""
    if index.num_classes is None:
        return None
    labels = samples.labels if samples.label_values is None else samples.label_values
    counts = np.zeros(index.num_classes, np.int64)
    for start in range(0, len(labels), _BLOCK_ROWS):
        counts += np.bincount(labels[start : start + _BLOCK_ROWS], minlength=index.num_classes)
    return counts


def _repeated_keys(index: DatasetIndex, samples: SampleTable) -> dict[str, Any]:
    count, pairs = repeated(samples.keys, limit=PAIRS_SHOWN)
    shards = shard_names_of(index, np.array(pairs, np.int64).reshape(-1))
    return {
        "count": count,
        "examples": [
            {"key": samples.key(first), "shards": shards[2 * i : 2 * i + 2]}
            for i, (first, _) in enumerate(pairs)
        ],
    }


def _near_duplicates(
    index: DatasetIndex,
    samples: SampleTable,
    val: DatasetIndex,
    args: argparse.Namespace,
    processes: int | None,
) -> dict[str, Any]:
    val_samples = open_samples(val, cache_dir=default_cache_dir())
    ours, theirs = (hash_dataset(each, processes=processes) for each in (index, val))
    pairs = alike(ours.values, theirs.values, distance=args.near_bits)
    order = np.argsort(pairs.distance, kind="stable")
    first, second = ours.samples[pairs.first[order]], theirs.samples[pairs.second[order]]
    keys = [samples.key(i) for i in np.unique(first).tolist()]
    if args.write_keys:
        try:
            text = "".join(f"{key}\n" for key in keys)
            Path(args.write_keys).write_text(text, encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise UsageError(f"--write-keys {args.write_keys}: {error}") from error
        print(f"wrote {len(keys)} keys to {args.write_keys}", file=sys.stderr)
    listed = zip(
        first.tolist(),
        shard_names_of(index, first),
        second.tolist(),
        pairs.distance[order].tolist(),
        strict=True,
    )
    return {
        "val": val.url,
        "pairs": [
            {"key": samples.key(a), "shard": shard, "val_key": val_samples.key(b), "bits": bits}
            for a, shard, b, bits in listed
        ],
        "samples": len(keys),
        "val_samples": len(np.unique(second)),
        "undecodable": ours.undecodable + theirs.undecodable,
        "single_coloured": ours.flat + theirs.flat,
    }


def _print_pairs(summary: dict[str, Any]) -> None:
    collisions = summary["repeated_keys"]
    if collisions["count"]:
        print(f"warning: {collisions['count']} samples have a key that another one has, as")
        for example in collisions["examples"]:
            print(f"  {example['key']} in {' and '.join(dict.fromkeys(example['shards']))}")
    near = summary.get("near_duplicates")
    if near is None:
        return
    print(
        f"near-duplicates: {near['samples']} samples here look like {near['val_samples']} of {near['val']} "
        f"({len(near['pairs'])} pairs; {near['single_coloured']} single-coloured and {near['undecodable']} "
        "undecodable images left out)"
    )
    for pair in near["pairs"][:PAIRS_SHOWN]:
        print(f"  {pair['key']} ({pair['shard']}) ~ {pair['val_key']}, {pair['bits']} bits differ")
    if len(near["pairs"]) > PAIRS_SHOWN:
        print(f"  … {len(near['pairs']) - PAIRS_SHOWN} more (--json lists all)")


def _look(storage: Storage, index: DatasetIndex, samples: SampleTable) -> list[Look]:
    """All images of a few chunks, spread over the dataset."""
    count = min(CHUNKS_LOOKED_AT, index.num_chunks)
    first_samples = np.concatenate(([0], np.cumsum(index.chunk_samples)))
    looks = []
    for chunk in np.linspace(0, index.num_chunks - 1, count).round().astype(int):
        name = index.shard_names[index.chunk_shard[chunk]]
        data = storage.read(name, int(index.chunk_offset[chunk]), int(index.chunk_bytes[chunk]))
        for row, sample in enumerate(frame(data, where=f"{name}, chunk {chunk}")):
            image = image_of(sample)
            assert image is not None, "frame gave a sample without an image"
            content = data[image[1] : image[1] + image[2]]
            labels = samples.label_set(int(first_samples[chunk]) + row)
            looks.append(Look(key=sample.key, labels=labels, data=content, size=image_size(content)))
    return looks


def _choose(looks: list[Look], count: int) -> list[Look]:
    """`count` of them: one of each class in turn, so that rare classes are seen, in order of class."""
    by_label: dict[tuple[int, ...], list[Look]] = {}
    for look in looks:
        by_label.setdefault(look.labels, []).append(look)
    labels = sorted(by_label)
    if len(labels) > count:  # spread over the classes
        labels = [labels[i] for i in np.linspace(0, len(labels) - 1, count).round().astype(int)]
    share, rest = divmod(count, len(labels))
    chosen = []
    for i, label in enumerate(labels):
        group = by_label[label]
        wanted = min(len(group), share + (i < rest))
        chosen += [group[k] for k in np.linspace(0, len(group) - 1, wanted).round().astype(int)]
    return chosen


def _write_sheet(path: Path, looks: list[Look], index: DatasetIndex) -> None:
    def caption(look: Look) -> str:
        if not look.labels:
            return look.key.rsplit("/", 1)[-1]
        names = index.class_names
        return ", ".join(names[label] if names is not None else f"class {label}" for label in look.labels)

    sheet = draw_sheet([(look.data, caption(look)) for look in looks])
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UsageError(f"--sheet {path}: {error}; give a place that can be written to") from error


def _summary(index: DatasetIndex, counts: np.ndarray | None, looks: list[Look]) -> dict[str, Any]:
    sizes = [look.size for look in looks if look.size is not None]
    classes = None
    if counts is not None:
        classes = [
            {
                "label": i,
                "name": None if index.class_names is None else index.class_names[i],
                "samples": int(n),
            }
            for i, n in enumerate(counts)
        ]
    return {
        "url": index.url,
        "identity": index.identity,
        "samples": index.num_samples,
        "shards": len(index.shard_names),
        "chunks": index.num_chunks,
        "bytes": int(index.shard_bytes.sum()),
        "largest_chunk_bytes": int(index.chunk_bytes.max()),
        "samples_a_chunk": [int(index.chunk_samples.min()), int(index.chunk_samples.max())],
        "largest_image_side": index.image_side,
        "labels_sorted": index.labels_sorted,
        "num_classes": index.num_classes,
        "label_kind": index.label_kind,
        "labels_overridden": index.labels_overridden,
        "captions": index.num_captions,
        "revision": index.revision,
        "classes": classes,
        "looked_at": {
            "images": len(looks),
            "unreadable": len(looks) - len(sizes),
            "mean_bytes": round(float(np.mean([len(look.data) for look in looks])), 1),
            "median_width": float(np.median([width for width, _ in sizes])) if sizes else None,
            "median_height": float(np.median([height for _, height in sizes])) if sizes else None,
        },
    }


def _print_table(index: DatasetIndex, counts: np.ndarray | None, summary: dict[str, Any]) -> None:
    low, high = summary["samples_a_chunk"]
    looked = summary["looked_at"]
    rows = {
        "samples": f"{index.num_samples}",
        "shards": f"{summary['shards']}, {summary['bytes'] / 1e6:.1f} MB",
        "chunks": f"{index.num_chunks} of {low} to {high} samples",
        "largest side": f"{index.image_side} pixels",
        "looked at": f"{looked['images']} images: median {looked['median_width']:g} × "
        f"{looked['median_height']:g} pixels, mean {looked['mean_bytes'] / 1e3:.1f} kB, "
        f"{looked['unreadable']} unreadable"
        if looked["median_width"] is not None
        else f"{looked['images']} images, none readable",
        "identity": index.identity,
        "captions": f"{index.num_captions}",
        "classes": "none, the samples have no labels"
        if counts is None
        else f"{index.num_classes}"
        + ", any number a sample" * (index.label_kind == "multi")
        + ", from a table and not from the tars" * index.labels_overridden,
    }
    for name, value in rows.items():
        print(f"{name:<13} {value}")
    if counts is None:
        return
    if index.labels_sorted:
        print("warning: the samples lie sorted by label; pack them again to shuffle them")
    names = index.class_names or [str(i) for i in range(len(counts))]
    order = np.argsort(-counts, kind="stable")
    shown = (
        order
        if len(order) <= CLASSES_SHOWN
        else [*order[: CLASSES_SHOWN // 2], *order[-CLASSES_SHOWN // 2 :]]
    )
    width = min(30, max(len(names[i]) for i in shown))
    for position, i in enumerate(shown):
        if len(order) > CLASSES_SHOWN and position == CLASSES_SHOWN // 2:
            print(f"  … {len(order) - CLASSES_SHOWN} classes between …")
        bar = "█" * round(BAR_WIDTH * counts[i] / max(1, counts.max()))
        print(f"  {names[i][:width]:<{width}} {counts[i]:>9} {bar}")
