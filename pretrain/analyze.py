"""Draw what a network has learned to look at: the figures of the ViT paper (arXiv:2010.11929, figure 7).

RUN is a run's folder (its newest checkpoint is taken), one of its checkpoints, or an export. OUT gets a picture and
a CSV file with its numbers for each of

    attention-distance   how far each head looks, in pixels, by layer: the distance between a patch and those it
                         attends to, weighted by attention, mean over patches and images. Class token and registers
                         have no place and are left out (what they draw is in the CSV). A Swin looks inside windows,
                         a PVT at shrunken keys: their places are the shrunken ones' centres
    position-embedding   the cosine between the position embeddings of any two patches, a map a patch (a ViT's)
    patch-filters        the principal components of the filters that embed a patch

Attention is looked at in real images: of --images (a folder of images, or an indexed dataset), or of the run's own
validation or training data. A run draws itself while it trains with eval.analyze in its recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain.analysis.choice import WHAT, What, spread_samples, why_no_figure
from pretrain.analysis.figures import analyze, write
from pretrain.analysis.picture import require_matplotlib
from pretrain.data.augment import DeviceTransform, EvalTransform
from pretrain.data.image_files import find_images, read_image
from pretrain.data.index import open_index
from pretrain.data.loader import EvalLoader
from pretrain.data.reader import ChunkReader
from pretrain.derived import is_image_source
from pretrain.errors import EXIT_FINISHED, DataError, PretrainError, UsageError
from pretrain.formats.incoming import Incoming, read_backbone
from pretrain.formats.loading import rebuild


def run(args: argparse.Namespace) -> int:
    require_matplotlib("pretrain analyze")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"{args.out}: is no folder; name one for the pictures")
    incoming = read_backbone(args.run, weights=args.weights)
    what = _what(incoming, args.what)
    batches: Any = ()
    origin = None
    if "attention-distance" in what:
        batches, origin = _images(incoming, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = incoming.spec
    findings = analyze(
        rebuild(spec, incoming.backbone).to(device),
        what,
        batches=tqdm(batches, desc="attention", unit="batch", disable=None),
        device_transform=DeviceTransform(mean=spec.mean, std=spec.std),
        device=device,
    )
    if findings.heads is not None and not findings.images:
        raise DataError(f"none of the images of {origin} could be read")
    try:
        pictures = write(findings, args.out, title=_title(incoming))
    except OSError as error:
        raise UsageError(
            f"{args.out}: cannot be written: {error.strerror or error}; name another folder"
        ) from error
    for picture in pictures:
        of = f", {findings.images} images of {origin}" if picture.stem == "attention-distance" else ""
        print(f"{picture} (and {picture.with_suffix('.csv').name}): {incoming.source}{of}")
    return EXIT_FINISHED


def _what(incoming: Incoming, asked: list[What] | None) -> list[What]:
    spec = incoming.spec
    reasons = {
        what: why_no_figure(what, name=spec.name, position_embedding=spec.position_embedding) for what in WHAT
    }
    for field, words in (("num_heads", "number of heads"), ("window_size", "windows")):
        if field in incoming.assumed:
            reasons["attention-distance"] = (
                f"a bare file does not say its {words}; name a run, a checkpoint or a folder with a config.json"
            )
    chosen = list(dict.fromkeys(asked)) if asked else [what for what in WHAT if reasons[what] is None]
    for what in chosen:
        if reasons[what]:
            raise UsageError(f"--what {what}: {incoming.source}: {reasons[what]}")
    for what in WHAT:
        if not asked and reasons[what]:
            print(f"no {what}: {reasons[what]}")
    return chosen


def _title(incoming: Incoming) -> str:
    """Short enough for a picture: the run's or export's own name, and the step."""
    path = Path(incoming.source.url)
    name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    step = "" if incoming.source.step is None else f", step {incoming.source.step:,}"
    average = ", average of the weights" if incoming.source.weights == "ema" else ""
    return f"{name}{step}{average}"


def _images(incoming: Incoming, args: argparse.Namespace) -> tuple[Any, str]:
    """Batches to look at, and where they are from."""
    transform = EvalTransform(image_size=incoming.spec.image_size)
    if args.images is not None and (Path(args.images).is_file() or is_image_source(args.images)):
        files = find_images([args.images])
        chosen = [
            files[i]
            for i in np.arange(min(args.limit, len(files))) * len(files) // min(args.limit, len(files))
        ]
        return _of_files(chosen, transform, batch_size=args.batch_size), args.images
    data = incoming.source.config.get("data", {})
    train = data.get("train")
    own = [data.get("val"), train[0]["url"] if isinstance(train, list) else train]  # a list is a mixture
    reasons = []
    for url in [args.images] if args.images is not None else [url for url in own if url]:
        try:
            index = open_index(url, s3=incoming.source.s3)
        except PretrainError as error:
            if args.images is not None:
                raise
            reasons.append(str(error))
            continue
        loader = EvalLoader(
            reader=ChunkReader(index, cache_dir=None, s3=incoming.source.s3),
            transform=transform,
            batch_size=args.batch_size,
            samples=spread_samples(np.asarray(index.chunk_samples), args.limit),
        )
        return loader, url
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise UsageError(
        f"attention-distance needs images, and {incoming.source} names none that can be reached{why}; "
        "give --images, or leave it out of --what"
    )


def _of_files(
    files: list[Path], transform: EvalTransform, *, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(files), batch_size):
        pixels = []
        for path in files[start : start + batch_size]:
            try:
                pixels.append(torch.tensor(transform(read_image(path), name=str(path)).pixels))
            except DataError as error:
                tqdm.write(f"left out: {error}")
        if pixels:
            yield {"images": torch.stack(pixels), "weights": torch.ones(len(pixels))}
