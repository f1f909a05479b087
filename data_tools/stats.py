"""Count and show what a dataset holds.

Prints samples, shards, bytes, image sizes of those looked at, and how many samples each class has.
--sheet draws some of the images, with their class names, into one picture to look at.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.scan import image_size
from data_tools.sheet import draw_sheet
from data_tools.start import wrong_if_unreachable
from pretrain.data.framer import frame, image_of
from pretrain.data.index import DatasetIndex, open_index, open_samples
from pretrain.errors import UsageError
from pretrain.storage import Storage, open_storage

CHUNKS_LOOKED_AT = 12  # spread evenly: enough to see, and little to fetch from a bucket
BAR_WIDTH = 40
CLASSES_SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class Look:
    """One image that was looked at. `label` is -1 without labels."""

    key: str
    label: int
    data: bytes
    size: tuple[int, int] | None  # (width, height) in pixels; None: not an image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix with shards and their index")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet")
    parser.add_argument("--images", type=int, default=80, help="on the sheet (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.images <= 2000:
        raise UsageError(f"--images {args.images}: from 1 to 2000 is possible")
    index = open_index(args.url)
    with wrong_if_unreachable():
        labels = open_samples(index).labels
        looks = _look(open_storage(args.url), index, labels)
    counts = None if index.num_classes is None else np.bincount(labels, minlength=index.num_classes)
    summary = _summary(index, counts, looks)
    if args.sheet:
        _write_sheet(Path(args.sheet), _choose(looks, args.images), index)
    if args.json:
        print(json.dumps(summary))
        return 0
    _print_table(index, counts, summary)
    if args.sheet:
        print(f"contact sheet: {args.sheet}")
    return 0


def _look(storage: Storage, index: DatasetIndex, labels: np.ndarray) -> list[Look]:
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
            label = int(labels[first_samples[chunk] + row])
            looks.append(Look(key=sample.key, label=label, data=content, size=image_size(content)))
    return looks


def _choose(looks: list[Look], count: int) -> list[Look]:
    """`count` of them: one of each class in turn, so that rare classes are seen, in order of class."""
    by_label: dict[int, list[Look]] = {}
    for look in looks:
        by_label.setdefault(look.label, []).append(look)
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
        if look.label < 0:
            return look.key.rsplit("/", 1)[-1]
        return index.class_names[look.label] if index.class_names is not None else f"class {look.label}"

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
        "classes": "none, the samples have no labels" if counts is None else f"{index.num_classes}",
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
        bar = "█" * round(BAR_WIDTH * counts[i] / counts.max())
        print(f"  {names[i][:width]:<{width}} {counts[i]:>9} {bar}")
