"""Print which sample stands at which position of a run: one JSON line a position.

Shows what any batch of a run was or will be made of, without running it: the order is a pure function of
the dataset, the seed and the position. `rank` is the one that gets the sample when `--world-size` ranks
share a batch; nothing else in a line depends on that number. Of a dataset, give the seed and the batch; of
a run's folder they are known, as are its mixtures and the changes of its data.

  pretrain order shards/train --seed 0 --start 768 --count 768 --global-batch-size 768 --world-size 4
  pretrain order runs/a --start 768 --count 768
  pretrain order runs/a --audit keys.txt        (one key a line: when each was seen in this run, if at all)

Lines: g (position), epoch, batch (number of the global batch), rank, shard, key; of a run also segment,
dataset and skipped: positions that the run jumps over are of no batch and no rank. An audit's: first the run, as
far as it has come, its segments, and the intervals that it skips; then for each key an `event` with g, step,
epoch, segment, dataset, shard: seen, seen_as_substitute, excluded, replaced, skipped, never_seen or unknown;
`committed` is false beyond the newest checkpoint. It costs a pass over the datasets' keys and, for each epoch
that was begun, about a second at 10**9 samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.audit import Audit
from data_tools.start import read_keys, wrong_if_unreachable
from pretrain.data.index import DatasetIndex, open_index, open_samples
from pretrain.data.index_cache import default_cache_dir
from pretrain.data.order import PAD, Order, lanes_for, sample_ends, slice_batch
from pretrain.data.stream import Stream
from pretrain.datasets import GoneDataset, is_run, open_run
from pretrain.derived import cache_dir, s3_settings
from pretrain.errors import UsageError
from pretrain.storage import S3Settings

MAX_SEED = 2**63 - 1  # as in a recipe
_FARTHEST = 2**60  # positions are 64-bit words; a run of this length would take longer than there is time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", metavar="URL|RUN", help="an indexed dataset (folder or s3://bucket/prefix), or a run's folder"
    )
    parser.add_argument("--seed", type=int, help="the run's seed (default 0; a run's own)")
    parser.add_argument("--start", type=int, default=0, metavar="G", help="the first position (default 0)")
    parser.add_argument("--count", type=int, metavar="N", help="how many positions (default: one batch)")
    parser.add_argument(
        "--global-batch-size", type=int, metavar="B", help="images a step (needed for a dataset)"
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="R", help="ranks (default 1)")
    parser.add_argument(
        "--lanes", type=int, metavar="L", help="as stored with the run (default: what a new run would take)"
    )
    parser.add_argument(
        "--audit", type=Path, metavar="FILE", help="of a run: when the samples with these keys were seen"
    )


def run(args: argparse.Namespace) -> int:
    for option, value, least, most in [
        ("--seed", args.seed, 0, MAX_SEED),
        ("--start", args.start, 0, _FARTHEST),
        ("--count", args.count, 0, _FARTHEST),
        ("--world-size", args.world_size, 1, _FARTHEST),
        ("--global-batch-size", args.global_batch_size, 2, _FARTHEST),
    ]:
        if value is not None and not least <= value <= most:
            raise UsageError(f"{option} must be from {least} to {most}: got {value}")
    of_run = is_run(Path(args.url))
    if args.audit is not None:
        if not of_run:
            raise UsageError(f"--audit: {args.url} is not a run's folder; an audit is of what a run has seen")
        keys = read_keys(args.audit, option="--audit")
        with wrong_if_unreachable():
            audit = Audit(open_run(Path(args.url)), keys)
        _print(audit.lines())
        return 0
    _print(_lines_of_run(args) if of_run else _lines_of_dataset(args))
    return 0


def _print(lines: Iterator[dict[str, Any]]) -> None:
    for line in lines:
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines_of_run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for option in ("seed", "lanes"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option}: {args.url} is a run, which has its own; leave it out")
    with wrong_if_unreachable():
        existing = open_run(Path(args.url))
    B = args.global_batch_size or existing.config.train.global_batch_size
    lanes_for(B)
    return list_order(
        existing.data.stream,
        existing.data.indexes,
        gone=existing.data.gone,
        start=args.start,
        count=B if args.count is None else args.count,
        global_batch_size=B,
        world_size=args.world_size,
        of_run=True,
        s3=s3_settings(existing.config),
        cached_in=cache_dir(existing.config),
    )


def _lines_of_dataset(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    B = args.global_batch_size
    if B is None:
        raise UsageError(
            f"--global-batch-size is needed: {args.url} is not a run's folder, which has its own"
        )
    lanes = lanes_for(B)
    if args.lanes is not None:
        if args.lanes < 2 or args.lanes % 2 or B % args.lanes:
            raise UsageError(
                f"--lanes must be even and divide --global-batch-size {B}: "
                f"got {args.lanes}; a new run would take {lanes}"
            )
        lanes = args.lanes
    index = open_index(args.url, cache_dir=default_cache_dir())
    order = Order(chunk_samples=index.chunk_samples, seed=args.seed or 0, lanes=lanes)
    return list_order(
        Stream(order),
        [index],
        start=args.start,
        count=B if args.count is None else args.count,
        global_batch_size=B,
        world_size=args.world_size,
        of_run=False,
        s3=S3Settings(),
        cached_in=default_cache_dir(),
    )


def list_order(
    stream: Stream,
    indexes: Sequence[DatasetIndex],
    *,
    gone: Sequence[GoneDataset] = (),
    start: int,
    count: int,
    global_batch_size: int,
    world_size: int,
    of_run: bool,
    s3: S3Settings,
    cached_in: Path,
) -> Iterator[dict[str, Any]]:
    """What stands at each of the positions [start, start + count), as {g, epoch, batch, rank, shard, key};
    `of_run` adds {segment, dataset, skipped}. Of datasets that are gone shard and key are None; so are batch and
    rank of positions that are skipped.
    """
    tables = [open_samples(index, s3=s3, cache_dir=cached_in) for index in indexes]
    ends = [sample_ends(index.chunk_samples) for index in indexes]
    B, end = global_batch_size, start + count
    skips = stream.skips
    while start < end:
        first = int(
            skips.position_of(skips.consumed(start) // B * B)
        )  # of the batch that start is in, or before
        batch = stream.batch(first, B)
        number, following = int(skips.consumed(first)) // B, stream.after(first, B)
        ranks: dict[int, tuple[int | None, int | None]] = {
            int(g): (number, rank)
            for rank in range(world_size)
            for g in slice_batch(batch, rank=rank, world_size=world_size)
            if g != PAD
        }
        positions = np.arange(start, min(end, following), dtype=np.int64)
        start = following
        places = stream.locate(positions)
        epochs, segments = stream.epoch(positions), stream.segment_of(positions)
        for i, g in enumerate(positions.tolist()):
            dataset, chunk, row = (int(column[i]) for column in places)
            there = dataset < len(indexes)
            url = indexes[dataset].url if there else gone[dataset - len(indexes)].url
            before = int(ends[dataset][chunk - 1]) if there and chunk else 0
            batch_number, rank = ranks.get(g, (None, None))
            line = {
                "g": g,
                "epoch": int(epochs[i]),
                "batch": batch_number,
                "rank": rank,
                "shard": shard_of(indexes[dataset], chunk) if there else None,
                "key": tables[dataset].key(before + row) if there else None,
            }
            of_its_run = {"segment": int(segments[i]), "dataset": url, "skipped": batch_number is None}
            yield {**line, **of_its_run} if of_run else line


def shard_of(index: DatasetIndex, chunk: int) -> str:
    return index.shard_names[int(index.chunk_shard[chunk])]
