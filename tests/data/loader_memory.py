"""Memory of a trainer's process and its loader workers over many batches: does it stay flat?

    python tests/data/loader_memory.py [--batches 40000] [--workers 2]

Prints the resident set size (RSS) of each process now and then, and for each a straight line's slope over the batches
after the first quarter. Not PSS: a process's share of libraries grows when another that had them ends. Called by
test_loader_memory.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402 - found only now
from tiny_shards import jpeg, write_dataset  # noqa: E402

from pretrain.data.augment import TrainTransform  # noqa: E402
from pretrain.data.loader import TrainLoader  # noqa: E402
from pretrain.data.order import Order  # noqa: E402
from pretrain.data.reader import ChunkReader  # noqa: E402
from pretrain.data.stream import Stream  # noqa: E402

B, SAMPLES = 16, 2000
BAD = 1000  # a sample that does not decode: replacing must not leak either


def resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Rss:")) << 10


def measure(folder: Path, *, batches: int, workers: int, samples: int = 100) -> dict[str, np.ndarray]:
    """Process -> RSS in bytes, float64[samples], at equal intervals; and "batch", where they were taken."""
    index = write_dataset(
        folder / "d",
        count=SAMPLES,
        per_shard=500,
        chunk_samples=50,
        image=lambda i: b"?" if i == BAD else jpeg(i),
    )
    order = Order(chunk_samples=index.chunk_samples, seed=1, lanes=8, block_chunks=2)
    assert not order.small, "lanes and blocks are to be part of it"
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(order),
        transform=TrainTransform(image_size=12),
        seed=1,
        global_batch_size=B,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        workers=workers,
    )
    taken: dict[str, list[float]] = {"batch": []}
    every = max(1, batches // samples)
    steps = loader.steps(0)
    for number in range(batches):
        next(steps)
        loader.gained()
        if number % every == every - 1:
            taken["batch"].append(number + 1)
            processes = {"trainer": os.getpid()}
            children = sorted(child.pid for child in multiprocessing.active_children() if child.pid)
            processes |= {f"worker {i}": pid for i, pid in enumerate(children)}
            for name, pid in processes.items():
                taken.setdefault(name, []).append(resident_bytes(pid))
    loader.close()
    return {name: np.array(values, np.float64) for name, values in taken.items()}


def slope(batch: np.ndarray, values: np.ndarray) -> float:
    """Bytes a batch, of a straight line through what comes after the first quarter."""
    late = batch > batch[-1] / 4
    return float(np.polyfit(batch[late], values[late], 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=40_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        taken = measure(Path(folder), batches=args.batches, workers=args.workers)
    batch = taken.pop("batch")
    print(
        f"{args.batches} batches of {B}, {args.workers} workers, {time.monotonic() - began:.0f} s; RSS in MiB"
    )
    names = list(taken)
    print(f"{'batch':>8} " + " ".join(f"{name:>10}" for name in names))
    for i in sorted({*np.linspace(0, len(batch) - 1, 11).astype(int).tolist()}):
        print(f"{batch[i]:>8.0f} " + " ".join(f"{taken[name][i] / 2**20:>10.2f}" for name in names))
    for name in names:
        print(f"{name}: {slope(batch, taken[name]):+.1f} bytes a batch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
