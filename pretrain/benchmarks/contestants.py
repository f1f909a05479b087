"""One loader over one dataset, timed: `python contestants.py JSON` in a process of its own. Called by data.py.

Prints what it measured as one JSON line. It runs in whatever Python the peer is installed in, so it imports
nothing of pretrain but in the contestant that is pretrain. All give batches of uint8 images (B, 3, S, S), randomly
cropped, resized with antialiasing and flipped.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH = 64


def random_resized_crop(data: bytes, side: int) -> np.ndarray:
    """The usual recipe with Pillow: decode, torchvision's RandomResizedCrop, flip."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    W, H = image.size
    for _ in range(10):
        area = W * H * random.uniform(0.08, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            break
    else:
        w, h = min(W, H), min(W, H)
    left, top = random.randint(0, W - w), random.randint(0, H - h)
    image = image.crop((left, top, left + w, top + h)).resize((side, side), Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1)


class Prepare:
    """(image, label) of a sample as the peers hand it over; in a class so that workers can be given it."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, sample: Any) -> tuple[np.ndarray, int]:
        data = next(sample[k] for k in ("jpg", "jpeg", "png", "webp", "image") if k in sample)
        label = sample.get("cls", 0)
        return random_resized_crop(data, self.side), int(label)


def collate(samples: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def workers_of(processes: int) -> int:
    """One process prepares by itself; of more, each is a worker."""
    return 0 if processes == 1 else processes


def shards_needed(name: str, processes: int) -> int:
    """webdataset hands whole shards to workers, and ends with an error in one that gets none."""
    return max(1, workers_of(processes)) if name.startswith("webdataset") else 1


def pretrain(spec: dict[str, Any]) -> Iterator[int]:
    from pathlib import Path

    from pretrain.data.augment import TrainTransform
    from pretrain.data.index import open_index
    from pretrain.data.loader import TrainLoader
    from pretrain.data.order import Order, lanes_for
    from pretrain.data.reader import ChunkReader
    from pretrain.data.stream import Stream

    index = open_index(spec["url"])
    reader = ChunkReader(index, cache_dir=Path(spec["cache_dir"]))
    order = Order(chunk_samples=index.chunk_samples, seed=0, lanes=lanes_for(BATCH))
    loader = TrainLoader(
        readers=[reader],
        stream=Stream(order),
        transform=TrainTransform(image_size=spec["size"]),
        seed=0,
        global_batch_size=BATCH,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=workers_of(spec["processes"]),
    )
    for (batch,) in loader.steps(0):
        for image, draws in zip(batch["images"], batch["draws"], strict=True):
            if draws[0] < 0.5:  # as DeviceTransform; the others flip here, too
                image.copy_(image.flip(-1))
        yield BATCH


def webdataset(spec: dict[str, Any]) -> Iterator[int]:
    import webdataset as wds

    urls = spec["shard_urls"]
    dataset = wds.WebDataset(urls, shardshuffle=False, nodesplitter=None, workersplitter=wds.split_by_worker)
    dataset = dataset.repeat().shuffle(200).map(Prepare(spec["size"])).batched(BATCH, collation_fn=collate)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers_of(spec["processes"]))
    for images, _ in loader:
        yield len(images)


def litdata(spec: dict[str, Any]) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    prepare = Prepare(spec["size"])

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[np.ndarray, int]:
            return prepare(super().__getitem__(index))

    source: Any = spec["converted"]["litdata"]
    own: dict[str, Any] = {}
    if "://" in source:
        import litdata.streaming.downloader as downloader

        # Its asynchronous client refuses endpoints without TLS, and has no option for it.
        downloader._OBSTORE_CLIENT_OPTIONS = {
            **(downloader._OBSTORE_CLIENT_OPTIONS or {}),
            "allow_http": True,
        }
        own = {"cache_dir": f"{spec['cache_dir']}-litdata"}
    while True:
        dataset = Images(source, shuffle=True, **own)
        loader = StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=workers_of(spec["processes"]), collate_fn=collate
        )
        for images, _ in loader:
            yield len(images)


def _declare_torchvision_operators() -> torch.library.Library:
    """streaming imports torchvision, whose binary is for one build of torch; it needs none of it here."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]
    return library


def streaming(spec: dict[str, Any]) -> Iterator[int]:
    _library = _declare_torchvision_operators()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()  # of an earlier turn, which says which shards are there
    prepare = Prepare(spec["size"])

    class Images(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[np.ndarray, int]:
            return prepare(super().__getitem__(at))

    place: dict[str, Any] = {"local": spec["converted"]["streaming"]}
    if "://" in place["local"]:
        os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
        place = {"remote": place["local"], "local": f"{spec['cache_dir']}-streaming"}
    dataset = Images(**place, shuffle=True, batch_size=BATCH)
    while True:
        loader: Any = torch.utils.data.DataLoader(
            dataset, batch_size=BATCH, num_workers=workers_of(spec["processes"]), collate_fn=collate
        )
        for images, _ in loader:
            yield len(images)


def convert_to_litdata(samples: list[tuple[bytes, int]], folder: str) -> None:
    from litdata.streaming.writer import BinaryWriter  # optimize() would start processes for it

    writer = BinaryWriter(folder, chunk_bytes=8 << 20)
    for number, (image, label) in enumerate(samples):
        writer.add_item(number, {"image": image, "cls": label})
    writer.done()
    writer.merge()


def convert_to_streaming(samples: list[tuple[bytes, int]], folder: str) -> None:
    _library = _declare_torchvision_operators()
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns={"image": "bytes", "cls": "int"}, size_limit=8 << 20) as writer:
        for image, label in samples:
            writer.write({"image": image, "cls": label})


CONTESTANTS: dict[str, Callable[[dict[str, Any]], Iterator[int]]] = {
    "pretrain": pretrain,
    "webdataset": webdataset,
    "webdataset pipe": webdataset,
    "litdata": litdata,
    "streaming": streaming,
}
CONVERSIONS = {"litdata": convert_to_litdata, "streaming": convert_to_streaming}


def members_of(tars: list[str]) -> list[tuple[bytes, int]]:
    """(image, label) of every sample of some tars on disk, for the peers that have formats of their own."""
    import tarfile

    found: dict[str, dict[str, bytes]] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                file = tar.extractfile(member)
                if file is not None:
                    found.setdefault(f"{path}/{key}", {})[suffix.lower()] = file.read()
    kinds = ("jpg", "jpeg", "png", "webp")
    return [
        (next(parts[k] for k in kinds if k in parts), int(parts.get("cls", b"0")))
        for parts in found.values()
        if any(k in parts for k in kinds)
    ]


def main(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    if "convert" in spec:
        CONVERSIONS[spec["convert"]](members_of(spec["tars"]), spec["folder"])
        return {}
    batches = CONTESTANTS[spec["contestant"]](spec)
    began = time.perf_counter()
    next(batches)  # imports, workers and the first reads are not what a run's speed is
    first = time.perf_counter() - began
    began, cpu, images = time.perf_counter(), time.process_time(), 0
    for count in itertools.islice(batches, spec["max_batches"]):
        images += count
        if time.perf_counter() - began >= spec["seconds"]:
            break
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"images": images, "seconds": seconds, "cpu_seconds": cpu, "first_batch_seconds": first}


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    sys.stdout.write(f"\n{json.dumps(result)}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some peers' workers and shared memory keep a process from ending by itself
