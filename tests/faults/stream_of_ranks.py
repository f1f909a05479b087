"""Consume a dataset as the ranks of a run would, and write down what they got. Started by test_one_stream.py.

    python stream_of_ranks.py SETTINGS.json OUT.jsonl

All ranks' loaders live in this one process, each with workers of its own. After every step a line with what
the ranks hold together goes to OUT: {"step": k, "samples": [[g, digest], …]}, where a digest is over the
target, the substitute's key if there is one, and the pixels as the network would see them: cropped, colours
changed, erased, mixed. Goes on until it
is killed, or `steps` are done.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from pretrain.data.augment import DeviceTransform, TrainTransform
from pretrain.data.index import open_index
from pretrain.data.loader import TrainLoader
from pretrain.data.mixup import Mixing
from pretrain.data.order import Order
from pretrain.data.rand_augment import RandAugment
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream
from pretrain.storage import RetryPolicy, S3Settings


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    # Patient with faults, and quick to see a stall: faults that pass must not end this.
    s3 = S3Settings(
        read_timeout_seconds=1.0,
        retry=RetryPolicy(attempts=100, seconds=120.0, first_delay_seconds=0.01, longest_delay_seconds=0.5),
    )
    index = open_index(settings["url"], s3=s3)
    order = Order(
        chunk_samples=index.chunk_samples, seed=settings["seed"], lanes=settings["lanes"], block_chunks=2
    )
    stream = Stream(order)
    B, R = settings["global_batch_size"], settings["world_size"]
    loaders = [
        TrainLoader(
            readers=[ChunkReader(index, cache_dir=Path(settings["cache_dir"]), s3=s3)],
            stream=stream,
            transform=TrainTransform(
                image_size=16, erasing=0.5, rand_augment=RandAugment(ops=2, magnitude=15)
            ),
            seed=settings["seed"],
            global_batch_size=B,
            micro_batch_size=settings["micro_batch_size"],
            rank=rank,
            world_size=R,
            workers=settings["workers"],
        )
        for rank in range(R)
    ]
    device_transform = DeviceTransform(mean=(0.5,) * 3, std=(0.25,) * 3, color_jitter=0.4, erases=True)
    mixing = Mixing(seed=settings["seed"], mixup=0.8, cutmix=1.0)
    iterators = [loader.steps(settings["start"] * B) for loader in loaders]
    with open(sys.argv[2], "a", encoding="utf-8") as out:
        for step in range(settings["start"], settings["steps"]):
            samples = []
            for loader, iterator in zip(loaders, iterators, strict=True):
                micro_batches = next(iterator)
                keys = {replaced.g: replaced.substitute_key for replaced in loader.replaced()}
                for batch in micro_batches:
                    pixels, mixed = mixing(device_transform(batch["images"], batch["draws"]), batch)
                    for i in torch.nonzero(batch["weights"]).flatten().tolist():
                        g = int(batch["positions"][i])
                        digest = hashlib.sha256(pixels[i].numpy().tobytes())
                        target = [mixed[name][i].item() for name in ("labels", "other_labels", "own_share")]
                        digest.update(f"{target} {keys.get(g, '')}".encode())
                        samples.append([g, digest.hexdigest()])
            out.write(json.dumps({"step": step, "samples": sorted(samples)}) + "\n")
            out.flush()
    for iterator in iterators:
        iterator.close()


if __name__ == "__main__":
    main()
