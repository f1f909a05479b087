"""How well the order shuffles data that lies sorted by class: class counts a batch, against a full permutation.

Of every batch (and of every 16 in a row) the chi-square of its class counts over its degrees of freedom: 1 is
what drawing at random gives, 0 is one of each, and a batch of one class gives the batch's size. `sorted` data lies
class after class, as a folder of folders does; `packed` is the same after `pretrain data pack`, which shuffles.

  pretrain benchmark shuffle
  pretrain benchmark shuffle --samples 1281167 --classes 1000 --chunk-samples 71 --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.order import Int64s, lanes_for
from pretrain.data.stream import Segment, Source, Stream
from pretrain.errors import UsageError

STRETCH = 16  # batches looked at together
# name, samples, classes, samples a chunk
DATASETS = [("CIFAR-100's size", 50_000, 100, 1024), ("ImageNet-1k's size", 1_281_167, 1000, 71)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=int, metavar="N", help="a dataset of this size instead of two known ones"
    )
    parser.add_argument("--classes", type=int, default=1000, metavar="K", help="its classes (default 1000)")
    parser.add_argument(
        "--chunk-samples", type=int, default=71, metavar="C", help="its samples a chunk (default 71)"
    )
    parser.add_argument(
        "--global-batch-size", type=int, default=1024, metavar="B", help="images a step (default 1024)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default 0)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")


def run(args: argparse.Namespace) -> int:
    lanes_for(args.global_batch_size)
    for option, value, least in [
        ("--samples", args.samples, 1),
        ("--classes", args.classes, 2),
        ("--chunk-samples", args.chunk_samples, 1),
        ("--seed", args.seed, 0),
    ]:
        if value is not None and value < least:
            raise UsageError(f"{option} must be at least {least}: got {value}")
    if args.samples is not None and args.samples < max(args.global_batch_size, args.classes):
        raise UsageError(
            f"--samples {args.samples}: at least one batch ({args.global_batch_size}) and one of each of the "
            f"{args.classes} classes are needed"
        )
    datasets = DATASETS
    if args.samples is not None:
        datasets = [(f"{args.samples:,} samples", args.samples, args.classes, args.chunk_samples)]
    rows = [
        row
        for name, samples, classes, chunk_samples in datasets
        for row in measure(
            name,
            samples=samples,
            classes=classes,
            chunk_samples=chunk_samples,
            global_batch_size=args.global_batch_size,
            seed=args.seed,
        )
    ]
    if args.json:
        for row in rows:
            print(json.dumps(row))
        return 0
    print(f"{'data':<20} {'stored':<8} {'order':<26} {'chi2/df a batch':>16} {f'of {STRETCH} batches':>16}")
    for row in rows:
        print(
            f"{row['data']:<20} {row['stored']:<8} {row['order']:<26} "
            f"{row['chi2_df_a_batch']:>16.3f} {row['chi2_df_a_stretch']:>16.3f}"
        )
    return 0


def measure(
    name: str, *, samples: int, classes: int, chunk_samples: int, global_batch_size: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The rows of one dataset: sorted and packed by the run's order, as it lies, and fully permuted."""
    in_order = np.arange(samples, dtype=np.int64) * classes // samples  # int64[N], the class of each sample
    packed = np.random.default_rng(seed + 1).permutation(in_order)
    sizes = np.full(-(-samples // chunk_samples), chunk_samples)
    sizes[-1] = samples - chunk_samples * (len(sizes) - 1)
    lanes = lanes_for(global_batch_size)
    stream = Stream([Segment([Source(dataset=0, chunk_samples=sizes)], seed=seed, lanes=lanes)])
    order = stream.segments[0].orders[0]
    ours = "permutation (small data)" if order.small else f"{lanes} lanes"
    seen = _samples_seen(stream, samples, sizes)
    rng = np.random.default_rng(seed + 2)
    for stored, ordered_by, labels in [
        ("sorted", ours, in_order[seen]),
        ("packed", ours, packed[seen]),
        ("sorted", "as it is stored", in_order),
        ("sorted", "full permutation", rng.permutation(in_order)),
    ]:
        yield {
            "data": name,
            "samples": samples,
            "classes": classes,
            "global_batch_size": global_batch_size,
            "stored": stored,
            "order": ordered_by,
            "chi2_df_a_batch": chi_square(labels, classes, global_batch_size),
            "chi2_df_a_stretch": chi_square(labels, classes, STRETCH * global_batch_size),
        }


def _samples_seen(stream: Stream, samples: int, sizes: npt.NDArray[Any]) -> Int64s:
    """int64[N]: sample numbers by position; whole batches are stretches of them."""
    starts = np.cumsum(sizes) - sizes
    places = stream.locate(np.arange(samples))
    return (starts[places.chunks] + places.rows).astype(np.int64)


def chi_square(labels: npt.NDArray[Any], classes: int, group: int) -> float:
    """Mean chi-square over degrees of freedom of the class counts of whole groups of consecutive labels."""
    groups = len(labels) // group
    if not groups:
        return float("nan")
    share = np.bincount(labels, minlength=classes) / len(labels)
    at = np.repeat(np.arange(groups), group) * classes + labels[: groups * group]
    counts = np.bincount(at, minlength=groups * classes).reshape(groups, classes)
    expected = share * group
    return float((((counts - expected) ** 2) / expected).sum(1).mean() / (classes - 1))
