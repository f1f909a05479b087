"""Images a second from shards to batches, split by stage, next to other loaders on the same images.

    pretrain benchmark data s3://bucket/shards                        an indexed dataset, as training reads it
    pretrain benchmark data shards --seconds 20 --repeats 5 --json
    pretrain benchmark data                                           makes 500 images of 500×375 first
    pretrain benchmark data shards --peer-python peers/bin/python     litdata and MosaicML streaming, too

The first table is one core's milliseconds an image for fetching (ranged reads, checked), framing (finding the
samples in a tar), decoding (with random crop and resize) and augmenting (what the device does, here on the CPU).
The second is images a second of whole loaders: this project's, and webdataset with Pillow and the usual recipe, on
plain URLs and through `pipe:`. Contestants take turns, so that whatever else the machine does meets all of them;
shown are the median, the lowest and the highest of --repeats turns, and the ratio to webdataset of the medians.
webdataset gives each process whole shards: with fewer shards than processes it cannot run, and is left out there.

litdata and MosaicML streaming have formats of their own: the images are converted into a temporary folder and read
from there, or, for a dataset in a bucket, from --scratch, where they stay. They pin old versions of numpy and
transformers, so give them an environment of their own:
    python -m venv peers && peers/bin/pip install torch pillow litdata mosaicml-streaming
    pretrain benchmark data s3://bucket/shards --peer-python peers/bin/python --scratch s3://bucket/peers
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pretrain.benchmarks import contestants
from pretrain.data.augment import DeviceTransform, TrainTransform
from pretrain.data.decode import resolve_decoder
from pretrain.data.frame_table import frame_table
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.keyed import KeyedRandom
from pretrain.data.reader import ChunkReader
from pretrain.errors import PretrainError, UsageError
from pretrain.storage import S3Settings, is_remote, join_url, open_storage

_SIGNED_SECONDS = 6 * 3600


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as temporary:
        folder = Path(temporary)
        url = args.url or made_images(folder / "images", count=args.images, shards=max(args.processes))
        index = open_index(url)
        peer_python = args.peer_python or sys.executable
        if args.scratch and not is_remote(args.scratch):
            raise UsageError(
                f"--scratch {args.scratch} is no bucket; leave it out, a temporary folder will do"
            )
        can_convert = bool(args.scratch) or not is_remote(url)
        names = args.only or [
            name
            for name in contestants.CONTESTANTS
            if name not in contestants.CONVERSIONS or (can_convert and _is_installed(name, peer_python))
        ]
        left_out = _left_out(names, index, args)
        for out in left_out:
            print(f"note: {out['loader']} with {out['processes']} processes: {out['why']}", file=sys.stderr)
        stages = measure_stages(index, images=args.images, size=args.size)
        if not args.json:
            _print_stages(stages)
        spec = {
            "url": url,
            "size": args.size,
            "seconds": args.seconds,
            "max_batches": 1 << 40,
            "converted": _converted(names, index, folder, peer_python, scratch=args.scratch),
        }
        pairs = [
            (processes, name)
            for processes in args.processes
            for name in names
            if not any(out["loader"] == name and out["processes"] == processes for out in left_out)
        ]
        loaders = measure_loaders(
            pairs, spec, index, repeats=args.repeats, folder=folder, peer_python=peer_python
        )
    if args.json:
        facts = {
            "url": url if args.url else None,
            "samples": index.num_samples,
            "size": args.size,
            "decoder": resolve_decoder("auto"),
            "cores": os.cpu_count(),
            "stages_ms_an_image": stages,
            "loaders": loaders,
            "left_out": left_out,
        }
        print(json.dumps(facts, indent=2))
    else:
        _print_loaders(loaders)
    return 0


def measure_stages(index: DatasetIndex, *, images: int, size: int) -> dict[str, float]:
    """Milliseconds an image of each stage, in this process; of fetching by the clock, else of this process's CPU."""
    spent = dict.fromkeys(("fetch", "frame", "decode", "augment"), 0.0)
    reader, storage = ChunkReader(index), open_storage(index.url)
    transform = TrainTransform(image_size=size)
    device = DeviceTransform(mean=(0.5,) * 3, std=(0.25,) * 3, color_jitter=0.3)
    random, done = KeyedRandom(0), 0
    transform(
        reader.read(0, 0).image, name="the first", random=random.at(0)
    )  # what is imported and opened once
    for number in range(index.num_chunks):
        chunk = reader.chunk(number)
        began = time.perf_counter()
        data = storage.read(chunk.shard, chunk.offset, chunk.num_bytes)
        spent["fetch"] += time.perf_counter() - began
        began = time.process_time()
        table = frame_table(data, where=chunk.shard)
        spent["frame"] += time.process_time() - began
        began = time.process_time()
        samples = []
        for row in range(len(table)):
            offset, length = int(table.offsets[row]), int(table.lengths[row])
            image = memoryview(data)[offset : offset + length]
            samples.append(transform(image, name=table.key(row), random=random.at(done + row)))
        spent["decode"] += time.process_time() - began
        batch = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        draws = torch.from_numpy(np.stack([sample.draws for sample in samples]))
        began = time.process_time()
        device(batch, draws)
        spent["augment"] += time.process_time() - began
        done += len(table)
        if done >= images:
            break
    return {stage: 1000 * seconds / done for stage, seconds in spent.items()}


def _left_out(names: list[str], index: DatasetIndex, args: argparse.Namespace) -> list[dict[str, Any]]:
    """{loader, processes, why} of what cannot run on so few shards.

    Raises UsageError when --only asks for it: who names a loader wants its number, and not a gap.
    """
    shards, out = len(index.shard_names), []
    for processes in args.processes:
        for name in names:
            needed = contestants.shards_needed(name, processes)
            if shards >= needed:
                continue
            plural = "shards" if shards > 1 else "shard"
            why = f"needs {needed} shards, one a process at least, and {index.url} has {shards} {plural}"
            if args.only:
                raise UsageError(
                    f"--processes {processes}: {name} {why}; give --processes {shards} at most, leave {name} out "
                    "of --only, or pack into more shards (pretrain data pack --shard-bytes)"
                )
            out.append({"loader": name, "processes": processes, "why": why})
    return out


def measure_loaders(
    pairs: list[tuple[int, str]],
    spec: dict[str, Any],
    index: DatasetIndex,
    *,
    repeats: int,
    folder: Path,
    peer_python: str,
) -> list[dict[str, Any]]:
    """One row a (number of processes, loader) of `pairs`; turns are interleaved."""
    turns: dict[tuple[int, str], list[dict[str, Any]]] = {}
    plan = [(repeat, processes, name) for repeat in range(repeats) for processes, name in pairs]
    for number, (repeat, processes, name) in enumerate(plan):
        _progress(f"{number + 1} of {len(plan)}: {name}, {processes} process(es), turn {repeat + 1}")
        own = {
            **spec,
            "contestant": name,
            "processes": processes,
            "cache_dir": str(folder / f"cache-{repeat}-{processes}"),  # cold: the peers have none
            "shard_urls": list(_shard_urls(index, pipe="pipe" in name)),
        }
        python = peer_python if name in contestants.CONVERSIONS else sys.executable
        try:
            turn = _in_a_process(python, own)
        except PretrainError as error:
            if name not in contestants.CONVERSIONS:
                raise
            _progress("")  # a peer's own trouble must not cost what the others have shown
            print(f"{name}, {processes} process(es), turn {repeat + 1}: {error}", file=sys.stderr)
        else:
            turns.setdefault((processes, name), []).append(turn)
    _progress("")
    speeds = {pair: [turn["images"] / turn["seconds"] for turn in told] for pair, told in turns.items()}
    rows = []
    for processes, name in pairs:
        if not speeds.get((processes, name)):
            continue
        pair = processes, name
        median, base = statistics.median(speeds[pair]), speeds.get((processes, "webdataset"))
        rows.append(
            {
                "loader": name,
                "processes": processes,
                "images_per_second": median,
                "lowest": min(speeds[pair]),
                "highest": max(speeds[pair]),
                "ratio_to_webdataset": median / statistics.median(base) if base else None,
                "first_batch_seconds": statistics.median(turn["first_batch_seconds"] for turn in turns[pair]),
                "cpu_ms_an_image": statistics.median(
                    1000 * turn["cpu_seconds"] / turn["images"] for turn in turns[pair]
                )
                if processes == 1
                else None,
            }
        )
    return rows


def _in_a_process(python: str, spec: dict[str, Any]) -> dict[str, Any]:
    script = str(Path(contestants.__file__))
    package = str(Path(contestants.__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if python != sys.executable:
        paths = []  # another environment: only the script goes along
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        [python, script, json.dumps(spec)], env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        what = spec.get("contestant") or f"converting to {spec['convert']}"
        raise PretrainError(
            f"{what} failed with exit code {done.returncode}; leave it out with --only:\n{done.stderr[-1000:]}"
        )
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _is_installed(name: str, peer_python: str) -> bool:
    test = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([peer_python, "-c", test], capture_output=True, check=False).returncode == 0


def _converted(
    names: list[str], index: DatasetIndex, folder: Path, peer_python: str, *, scratch: str | None
) -> dict[str, str]:
    """Where the peers' own formats of the same images are."""
    places: dict[str, str] = {}
    wanted = [name for name in contestants.CONVERSIONS if name in names]
    if not wanted:
        return places
    storage = open_storage(index.url)
    if is_remote(index.url):
        if not scratch:
            raise UsageError(
                f"{' and '.join(wanted)} read formats of their own, which are not in {index.url}: name a place in "
                "the bucket with --scratch where they may be put, or leave them out of --only"
            )
        tars = []
        for number, shard in enumerate(index.shard_names):
            _progress(f"fetching shard {number + 1} of {len(index.shard_names)} for {' and '.join(wanted)}")
            tars.append(folder / f"{number:06d}.tar")
            with tars[-1].open("wb") as file:
                file.writelines(storage.stream(shard))
    else:
        tars = [path for shard in index.shard_names if (path := storage.local_path(shard))]
    for name in wanted:
        _progress(f"converting the images for {name}")
        places[name] = str(folder / name)
        _in_a_process(peer_python, {"convert": name, "tars": list(map(str, tars)), "folder": places[name]})
        if is_remote(index.url):
            assert scratch is not None
            target = open_storage(join_url(scratch, name))
            for path in sorted(Path(places[name]).rglob("*")):
                if path.is_file():
                    target.put(path.relative_to(places[name]).as_posix(), path)
            places[name] = target.url
    return places


def _shard_urls(index: DatasetIndex, *, pipe: bool) -> Iterator[str]:
    """What webdataset is given: paths and signed URLs, or the commands that print what they hold."""
    if is_remote(index.url):
        from pretrain.storage.s3_client import make_client

        bucket, _, prefix = index.url.removeprefix("s3://").strip("/").partition("/")
        client = make_client(S3Settings(), index.url)
        for shard in index.shard_names:
            key = f"{prefix}/{shard}" if prefix else shard
            signed = client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_SIGNED_SECONDS
            )
            yield f"pipe:curl --silent --fail '{signed}'"  # webdataset reads URLs through curl, too
        return
    storage = open_storage(index.url)
    for shard in index.shard_names:
        path = storage.local_path(shard)
        assert path is not None, f"{join_url(index.url, shard)} has no path"
        yield f"pipe:cat '{path.resolve()}'" if pipe else str(path.resolve())


def made_images(folder: Path, *, count: int, shards: int) -> str:
    """At least so many shards of `count` JPEGs of 500×375, of a photograph's size in bytes, with an index."""
    import webdataset

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    per_shard = max(1, min(100, count // shards))
    for shard, first in enumerate(range(0, count, per_shard)):
        with webdataset.TarWriter(str(folder / f"{shard:04d}.tar"), encoder=False) as writer:
            for number in range(first, min(first + per_shard, count)):
                _progress(f"making image {number + 1} of {count}")
                small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                smooth = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
                grain = rng.integers(-12, 13, (375, 500, 1), dtype=np.int16)
                path = folder / "image.jpg"
                Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=92)
                label = str(number % 10).encode()
                writer.write({"__key__": f"{number:06d}", IMAGE_SUFFIXES[0]: path.read_bytes(), "cls": label})
    (folder / "image.jpg").unlink()
    command = [sys.executable, "-m", "pretrain.cli", "data", "index", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PretrainError(f"indexing the images failed: {done.stderr[-1000:]}")
    return str(folder)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _print_stages(stages: dict[str, float]) -> None:
    total = sum(stages.values())
    print(f"one core, milliseconds an image (decoder: {resolve_decoder('auto')}):")
    for stage, spent in stages.items():
        print(f"  {stage:<8} {spent:8.3f}  {100 * spent / total:5.1f} %")
    print(f"  {'all':<8} {total:8.3f}  {1000 / total:.0f} images/s\n", flush=True)


def _print_loaders(rows: list[dict[str, Any]]) -> None:
    print(f"{'loader':<16} processes  images/s    lowest – highest    ratio to webdataset")
    for row in rows:
        ratio = row["ratio_to_webdataset"]
        print(
            f"{row['loader']:<16} {row['processes']:>9} {row['images_per_second']:>9.1f}"
            f"  {row['lowest']:>8.1f} – {row['highest']:<8.1f}  {f'{ratio:.2f}' if ratio else '–':>10}"
        )
