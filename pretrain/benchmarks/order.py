"""What the order costs: an epoch's table, then any position, in time and memory.

Builds the order of a dataset of so many samples, without the dataset: only the sizes of its chunks decide.
Seconds are of this process alone, memory is what it holds above a bare one that has imported the same.

  pretrain benchmark order --samples 1e9
  pretrain benchmark order --samples 1e9 --excluded 1e6 --json
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.excluded import ExcludingOrder
from pretrain.data.order import MAX_LANES, Order
from pretrain.errors import UsageError

BATCH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples", type=whole_number, default=10**9, metavar="N", help="samples (default 1e9)"
    )
    parser.add_argument(
        "--chunk-samples",
        type=whole_number,
        default=71,
        metavar="C",
        help="samples a chunk (default 71: 110 kB each)",
    )
    parser.add_argument(
        "--lanes", type=whole_number, default=MAX_LANES, metavar="L", help="lanes (default 256)"
    )
    parser.add_argument(
        "--excluded", type=whole_number, default=0, metavar="N", help="samples that are excluded"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def whole_number(text: str) -> int:
    value = float(text)  # 1e9 is how one writes it
    if not value.is_integer():  # nor is inf or nan
        raise ValueError(text)
    return int(value)


def run(args: argparse.Namespace) -> int:
    for option, value, least in [
        ("--samples", args.samples, 1),
        ("--chunk-samples", args.chunk_samples, 1),
        ("--lanes", args.lanes, 2),
        ("--excluded", args.excluded, 0),
    ]:
        if value < least:
            raise UsageError(f"{option} must be at least {least}: got {value}")
    if args.lanes % 2:
        raise UsageError(f"--lanes must be even: got {args.lanes}; take {args.lanes + 1}")
    if args.excluded >= args.samples:
        raise UsageError(f"--excluded {args.excluded} of {args.samples} samples leaves none")
    found = measure(
        samples=args.samples, chunk_samples=args.chunk_samples, lanes=args.lanes, excluded=args.excluded
    )
    if args.json:
        print(json.dumps(found))
        return 0
    width = max(len(name) for name in found)
    for name, value in found.items():
        said = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if name != "mode" else value
        print(f"{name.replace('_', ' '):<{width}}  {said}")
    return 0


def measure(*, samples: int, chunk_samples: int, lanes: int, excluded: int = 0) -> dict[str, Any]:
    """Seconds, microseconds and bytes, by names that say which."""
    bare = _resident_bytes()
    chunks = -(-samples // chunk_samples)
    sizes = np.full(chunks, chunk_samples, np.int32)
    sizes[-1] = samples - chunk_samples * (chunks - 1)
    plain = Order(chunk_samples=sizes, seed=0, lanes=lanes)
    order: Order | ExcludingOrder = plain
    if excluded:
        order = ExcludingOrder(plain, np.linspace(0, samples - 1, excluded).astype(np.int64))
    first_position = _seconds(lambda: order.locate([0]))
    after_one = _resident_bytes() - bare
    # The first batches open all lanes' blocks; what comes then is what a run meets.
    opening = batch_seconds(order, 0)
    batches = [batch_seconds(order, k) for k in range(1, min(65, max(2, samples // BATCH // 2)))]
    rng = np.random.default_rng(0)
    near = rng.integers(0, min(samples, 64 * BATCH), 2000).tolist()
    singles = [single_seconds(order, g) for g in near]
    anywhere = [single_seconds(order, g) for g in rng.integers(0, samples, 500).tolist()]
    crossing = batch_seconds(order, samples // BATCH)
    return {
        "samples": samples,
        "chunks": chunks,
        "lanes": lanes,
        "excluded": excluded,
        "mode": "a permutation of samples" if order.small else "lanes",
        "epoch_table_seconds": first_position,
        "first_batch_milliseconds": opening * 1e3,
        "microseconds_a_position_in_batches": statistics.median(batches) / BATCH * 1e6,
        "microseconds_a_single_position": statistics.median(singles) * 1e6,
        "microseconds_a_single_position_anywhere": statistics.median(anywhere) * 1e6,
        "batch_across_an_epochs_end_seconds": crossing,
        "gigabytes_with_one_epochs_table": after_one / 1e9,
        "gigabytes_at_most": (_peak_bytes() - bare) / 1e9,
    }


def batch_seconds(order: Order | ExcludingOrder, number: int) -> float:
    return _seconds(lambda: order.locate(order.batch(number * BATCH, BATCH)))


def single_seconds(order: Order | ExcludingOrder, position: int) -> float:
    return _seconds(lambda: order.locate([position]))


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def _resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if not status.exists():  # elsewhere: the most so far
        return _peak_bytes()
    return int(status.read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
    # Not ru_maxrss: it keeps what the process was before it became this program, that is its parent's size.
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
