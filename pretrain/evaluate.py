"""Measure how good a backbone's features are, without training it.

RUN is a run's folder (its newest checkpoint is taken), one of its checkpoints, or an export. Both
datasets are seen as in validation: the image's centre, no augmentation. --init random measures the same
network untrained: what the pretraining adds is the difference.

    knn        the 20 nearest training images vote (DINO)
    knn-standardized   the same, each feature brought to mean 0 and deviation 1 before: what all images have in common,
               much after SimMIM, then hides nothing
    linear     logistic regression on the training features, its penalty chosen on a tenth of them
    few-shot   least squares on --shots images a class, mean of three draws (ViT's few-shot accuracy); a class with
               fewer gives all it has. A result for each number
    dense      a linear classifier of single patches, each labelled as its image is: the share of patches that it
               gets right. How much of the class local features tell, not where things are: without labels of pixels
               nothing more can be asked. The other probes are of pooled features

A run measures itself while it trains with eval.probes in its recipe, by the same code. The result is printed, and
appended to the run's journal.jsonl as event "probe".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain.checkpoint.manifest import CHECKPOINTS
from pretrain.data.augment import DeviceTransform, EvalTransform
from pretrain.data.index import DatasetIndex, open_index, open_samples
from pretrain.data.loader import Batch, EvalLoader
from pretrain.data.reader import ChunkReader
from pretrain.distributed import World
from pretrain.errors import UsageError
from pretrain.formats.incoming import Incoming, read_backbone
from pretrain.formats.loading import rebuild
from pretrain.metrics.journal import JOURNAL_NAME, Journal
from pretrain.models.backbone import Backbone
from pretrain.models.build import build_backbone
from pretrain.probes.choose import choose_samples, refuse_unfit
from pretrain.probes.suite import ProbeChoice, run_probes
from pretrain.storage import S3Settings


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    incoming = read_backbone(args.run, weights=args.weights)
    if incoming.assumed:
        raise UsageError(
            f"{incoming.source}: a bare file does not say its {', '.join(incoming.assumed)}; "
            "evaluate a run, a checkpoint or a folder with a config.json"
        )
    s3 = incoming.source.s3
    train, val = open_index(args.train, s3=s3), open_index(args.val, s3=s3)
    refuse_unfit(train, val)
    assert train.num_classes is not None, "data without classes was refused"

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = incoming.spec
    train_loader, val_loader = (
        _loader(index, image_size=spec.image_size, s3=s3, args=args, name=name)
        for index, name in ((train, "train"), (val, "val"))
    )
    choice = ProbeChoice(
        knn=args.probe == "knn",
        knn_standardized=args.probe == "knn-standardized",
        linear=args.probe == "linear",
        few_shot=tuple(args.shots) if args.probe == "few-shot" else (),
        dense=args.probe == "dense",
        seed=args.seed,
    )
    found = run_probes(
        _backbone(incoming, init=args.init, seed=args.seed).to(device),
        choice,
        train=train_loader,
        val=val_loader,
        num_classes=train.num_classes,
        device_transform=DeviceTransform(mean=spec.mean, std=spec.std),
        world=World(rank=0, local_rank=0, world_size=1, device=device, launched=False),
    )
    facts = {
        "init": args.init,
        "weights": incoming.source.weights,
        "step": incoming.source.step,
        "samples": incoming.source.samples,
        "train": train.url,
        "train_identity": train.identity,
        "train_samples": found.train_samples,
        "val": val.url,
        "val_identity": val.identity,
        "val_samples": found.val_samples,
        "num_classes": train.num_classes,
        "seconds": round(time.monotonic() - started, 3),
    }
    results = [{"probe": name, "top1": top1, "by": "evaluate", **facts} for name, top1 in found.top1.items()]
    _record(incoming, results)
    what = "the same network, untrained" if args.init == "random" else str(incoming.source)
    for result in results:
        if args.json:
            print(json.dumps({"source": incoming.source.url, **result}))
            continue
        patches = "the patches of " if result["probe"] == "dense" else ""
        print(
            f"{what}: {result['probe']} top-1 {100 * result['top1']:.2f} % of {patches}{found.val_samples} images "
            f"in {train.num_classes} classes, from {found.train_samples} training images"
        )
    return 0


def _backbone(incoming: Incoming, *, init: str, seed: int) -> Backbone:
    if init == "random":
        torch.manual_seed(seed)
        return build_backbone(incoming.spec)
    return rebuild(incoming.spec, incoming.backbone)


def _loader(
    index: DatasetIndex, *, image_size: int, s3: S3Settings, args: argparse.Namespace, name: str
) -> _Shown:
    samples = None
    if args.limit is not None:
        labels = np.asarray(open_samples(index, s3=s3, cache_dir=args.cache_dir).labels)
        samples = choose_samples(labels, index.chunk_samples, count=args.limit)
    reader = ChunkReader(index, cache_dir=args.cache_dir, s3=s3)
    loader = EvalLoader(
        reader=reader,
        samples=samples,
        transform=EvalTransform(image_size=image_size),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    return _Shown(loader, reader, name)


class _Shown:
    """A loader whose pass is shown as a progress bar, and whose left out images are told of."""

    def __init__(self, loader: EvalLoader, reader: ChunkReader, name: str) -> None:
        self._loader, self._reader, self._name = loader, reader, name

    @property
    def unreadable(self) -> list[Any]:
        return self._loader.unreadable

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from tqdm(
                self._loader,
                desc=f"{self._name} features",
                total=len(self._loader),
                unit="batch",
                disable=None,
            )
        finally:
            self._reader.close()
        if self.unreadable:
            first = self.unreadable[0].error
            print(
                f"{self._name}: {len(self.unreadable)} images are left out, the first: {first}",
                file=sys.stderr,
            )


def _record(incoming: Incoming, results: Sequence[Mapping[str, Any]]) -> None:
    """Lines in the run's journal; exports have none."""
    if incoming.source.kind != "run":
        return
    folder = Path(incoming.source.url).parent
    if folder.name != CHECKPOINTS:  # a checkpoint that was copied out of its run
        return
    journal = Journal(folder.parent / JOURNAL_NAME, attempt=incoming.source.attempt or 0)
    try:
        for result in results:
            journal.append("probe", **result)
    finally:
        journal.close()
