"""What framing and decoding cost one core, decoder by decoder, on a dataset's own images.

    pretrain benchmark decode shards                          500 of its images, cropped at random to 224 pixels
    pretrain benchmark decode small --against shards          small: what `pretrain data pack --max-side` made of it
    pretrain benchmark decode                                 of 500 images of 500×375 that it makes first

Each decoder gets the same images and the same crops, in turns; shown is the median over --repeats turns of this
process's CPU time, and the ratio to Pillow with the usual recipe (decode all, crop, resize). OpenCV and simplejpeg
take part where they are installed; theirs are not antialiased when they shrink. Framing is finding the samples in
a chunk's bytes, next to webdataset's own iterator. With --against, Pillow decodes the other dataset's images.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.benchmarks.data import made_images
from pretrain.data.augment import CROP_TRIES, TrainTransform, random_box
from pretrain.data.decode import resolve_decoder
from pretrain.data.frame_table import frame_table
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.keyed import KeyedRandom
from pretrain.data.reader import ChunkReader
from pretrain.errors import UsageError
from pretrain.storage import open_storage

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PLAIN = "Pillow, the usual recipe"

Decode = Callable[[bytes, int], Any]  # (an image's bytes, its position) -> the crop


def run(args: argparse.Namespace) -> int:
    for name in ("images", "size", "repeats"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: at least 1")
    if args.against and not args.url:
        raise UsageError("--against compares with a dataset that is named; give its URL first")
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as temporary:
        index = open_index(args.url or made_images(Path(temporary) / "images", count=args.images, shards=1))
        images = read_images(index, args.images)
        plain = read_images(open_index(args.against), args.images) if args.against else images
        decoding = measure_decoders(images, plain, size=args.size, repeats=args.repeats)
        framing = measure_framing(index, repeats=args.repeats)
    if args.json:
        print(json.dumps({"images": len(images), "decode": decoding, "frame": framing}, indent=2))
        return 0
    for title, unit, table in (
        (f"decode, random crop, resize to {args.size}: {len(images)} images", "ms an image", decoding),
        ("framing", "µs a sample", framing),
    ):
        print(title)
        for name, row in table.items():
            print(f"  {name:<28} {row['median']:9.2f} {unit}   {row['ratio']:6.2f} ×")
    return 0


def read_images(index: DatasetIndex, count: int) -> list[bytes]:
    """The first `count` images."""
    images: list[bytes] = []
    reader = ChunkReader(index)
    for chunk in range(index.num_chunks):
        for row in range(int(index.chunk_samples[chunk])):
            if len(images) == count:
                break
            images.append(bytes(reader.read(chunk, row).image))
    reader.close()
    return images


def measure_decoders(
    images: Sequence[bytes], plain: Sequence[bytes], *, size: int, repeats: int
) -> dict[str, dict[str, float]]:
    """CPU milliseconds an image of each decoder, and how many times as fast as Pillow it is."""
    random = KeyedRandom(0)

    def box(width: int, height: int, position: int) -> tuple[int, int, int, int]:
        draws = random.at(position).uniform(4 * CROP_TRIES).reshape(CROP_TRIES, 4)
        found = random_box((width, height), scale=SCALE, ratio=RATIO, draws=draws)
        left, top = int(found.left), int(found.top)
        return left, top, left + int(found.width), top + int(found.height)

    def usual(data: bytes, position: int) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        crop = image.crop(box(*image.size, position))
        return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))

    def ours(decoder: str) -> Decode:
        transform = TrainTransform(image_size=size, decoder=decoder)  # type: ignore[arg-type]
        return lambda data, position: transform(data, name="an image", random=random.at(position))

    decoders: dict[str, Decode] = {PLAIN: usual, "pillow, scaled (ours)": ours("pillow")}
    if resolve_decoder("auto") == "region":
        decoders["region (ours)"] = ours("region")
    decoders |= _others(box, size, all_jpegs=all(image[:2] == b"\xff\xd8" for image in images))
    spent: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        for name, decode in decoders.items():
            given = plain if name == PLAIN else images
            decode(given[0], 0)  # what is imported and opened once
            began = time.process_time()
            for position, data in enumerate(given):
                decode(data, position)
            spent[name].append((time.process_time() - began) / len(given) * 1e3)
    return _medians(spent, first=PLAIN)


def _others(
    box: Callable[[int, int, int], tuple[int, int, int, int]], size: int, *, all_jpegs: bool
) -> dict[str, Decode]:
    """Decoders that happen to be installed."""
    if not find_spec("cv2"):
        return {}
    import cv2

    def shrink(pixels: Any, position: int) -> Any:
        left, top, right, bottom = box(pixels.shape[1], pixels.shape[0], position)
        return cv2.resize(pixels[top:bottom, left:right], (size, size), interpolation=cv2.INTER_LINEAR)

    def opencv(data: bytes, position: int) -> Any:
        return shrink(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), position)

    found: dict[str, Decode] = {"OpenCV": opencv}
    if all_jpegs and find_spec("simplejpeg"):
        import simplejpeg

        found["simplejpeg"] = lambda data, position: shrink(
            simplejpeg.decode_jpeg(data, min_height=size, min_width=size), position
        )
    return found


def measure_framing(index: DatasetIndex, *, repeats: int, chunks: int = 4) -> dict[str, dict[str, float]]:
    """CPU microseconds a sample, on the bytes of some chunks, in memory."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    storage = open_storage(index.url)
    held = []
    for number in np.linspace(0, index.num_chunks - 1, min(chunks, index.num_chunks)).round().astype(int):
        name = index.shard_names[int(index.chunk_shard[number])]
        held.append(storage.read(name, int(index.chunk_offset[number]), int(index.chunk_bytes[number])))

    def webdataset(data: bytes) -> int:
        members = tar_file_expander([{"url": "chunk", "stream": io.BytesIO(data)}])
        return sum(1 for _ in group_by_keys(members))

    framers: dict[str, Callable[[bytes], int]] = {
        "webdataset": webdataset,
        "ours": lambda data: len(frame_table(data, where="chunk")),
    }
    spent: dict[str, list[float]] = {name: [] for name in framers}
    for _ in range(repeats):
        for name, framer in framers.items():
            passes = 1 if name == "webdataset" else 10
            began, samples = time.process_time(), 0
            for _ in range(passes):
                samples += sum(framer(data) for data in held)
            spent[name].append((time.process_time() - began) / samples * 1e6)
    return _medians(spent, first="webdataset")


def _medians(spent: dict[str, list[float]], *, first: str) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(turns) for name, turns in spent.items()}
    return {name: {"median": median, "ratio": medians[first] / median} for name, median in medians.items()}
