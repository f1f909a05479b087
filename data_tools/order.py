"""Print which sample stands at which position of a run: one JSON line a position.

Shows what any batch of a run was or will be made of, without running it: the order is a pure function of
the dataset, the seed and the position. `rank` is the one that gets the sample when `--world-size` ranks
share a batch; nothing else in a line depends on that number.

  pretrain order shards/train --seed 0 --start 768 --count 768 --global-batch-size 768 --world-size 4

Lines: g (position), epoch, batch (number of the global batch), rank, shard, key.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from pretrain.data.index import open_index, open_samples
from pretrain.data.order import PAD, Order, lanes_for, slice_batch
from pretrain.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="an indexed dataset: a folder or s3://bucket/prefix")
    parser.add_argument("--seed", type=int, default=0, help="the run's seed (default 0)")
    parser.add_argument("--start", type=int, default=0, metavar="G", help="the first position (default 0)")
    parser.add_argument("--count", type=int, metavar="N", help="how many positions (default: one batch)")
    parser.add_argument("--global-batch-size", type=int, required=True, metavar="B", help="images a step")
    parser.add_argument("--world-size", type=int, default=1, metavar="R", help="ranks (default 1)")
    parser.add_argument(
        "--lanes", type=int, metavar="L", help="as stored with the run (default: what a new run would take)"
    )


def run(args: argparse.Namespace) -> int:
    count = args.global_batch_size if args.count is None else args.count
    for option, value, least in [
        ("--seed", args.seed, 0),
        ("--start", args.start, 0),
        ("--count", count, 0),
        ("--world-size", args.world_size, 1),
    ]:
        if value < least:
            raise UsageError(f"{option} must be at least {least}: got {value}")
    lanes = lanes_for(args.global_batch_size)
    if args.lanes is not None:
        if args.lanes < 2 or args.lanes % 2 or args.global_batch_size % args.lanes:
            raise UsageError(
                f"--lanes must be even and divide --global-batch-size {args.global_batch_size}: "
                f"got {args.lanes}; a new run would take {lanes}"
            )
        lanes = args.lanes
    lines = list_order(
        args.url,
        seed=args.seed,
        start=args.start,
        count=count,
        global_batch_size=args.global_batch_size,
        world_size=args.world_size,
        lanes=lanes,
    )
    for line in lines:
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 0


def list_order(
    url: str, *, seed: int, start: int, count: int, global_batch_size: int, world_size: int, lanes: int
) -> Iterator[dict[str, Any]]:
    """What stands at each of the positions [start, start + count), as {g, epoch, batch, rank, shard, key}.

    Raises:
        UsageError: there is no index at `url`. DataError: the index is damaged.
    """
    index = open_index(url)
    samples = open_samples(index)
    order = Order(chunk_samples=index.chunk_samples, seed=seed, lanes=lanes)
    chunk_starts = np.cumsum(index.chunk_samples, dtype=np.int64) - index.chunk_samples
    B = global_batch_size
    for batch_number in range(start // B, -(-(start + count) // B)):
        batch = order.batch(batch_number * B, B)
        ranks = np.empty(B, np.int64)
        for rank in range(world_size):
            own = slice_batch(batch, rank=rank, world_size=world_size)
            ranks[own[own != PAD] - batch_number * B] = rank
        first, end = max(start, batch_number * B), min(start + count, (batch_number + 1) * B)
        positions = np.arange(first, end, dtype=np.int64)
        chunks, rows = order.locate(positions)
        epochs = order.epoch(positions)
        for i, g in enumerate(positions.tolist()):
            yield {
                "g": g,
                "epoch": int(epochs[i]),
                "batch": batch_number,
                "rank": int(ranks[g - batch_number * B]),
                "shard": index.shard_names[int(index.chunk_shard[chunks[i]])],
                "key": samples.key(int(chunk_starts[chunks[i]] + rows[i])),
            }
