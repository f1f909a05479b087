"""Measure how good a backbone's features are, without training it.

RUN is a run's folder (its newest checkpoint is taken), one of its checkpoints, or an export. Both
datasets are seen as in validation: the image's centre, no augmentation. `knn` lets the 20 nearest
training images vote; `linear` fits a logistic regression on the training features. --init random
measures the same network untrained: what the pretraining adds is the difference.

The result is printed, and appended to the run's journal.jsonl as event "probe".
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint.manifest import CHECKPOINTS
from pretrain.data.augment import DeviceTransform, EvalTransform
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.loader import Batch, EvalLoader
from pretrain.data.reader import ChunkReader
from pretrain.errors import UsageError
from pretrain.formats.incoming import Incoming, read_backbone
from pretrain.formats.loading import rebuild
from pretrain.metrics.journal import JOURNAL_NAME, Journal
from pretrain.models.backbone import Backbone
from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec
from pretrain.probes.features import extract_features
from pretrain.probes.knn import knn_top1
from pretrain.probes.linear import linear_top1
from pretrain.storage import S3Settings

PROBES = ("knn", "linear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or an export")
    parser.add_argument("--probe", choices=PROBES, required=True)
    parser.add_argument("--train", metavar="URL", required=True, help="labelled dataset to learn from")
    parser.add_argument("--val", metavar="URL", required=True, help="labelled dataset to be right on")
    parser.add_argument("--init", choices=("trained", "random"), default="trained")
    parser.add_argument("--seed", type=int, default=0, help="of --init random, and of the linear probe")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N")
    parser.add_argument(
        "--workers", type=_not_negative, default=2, metavar="N", help="processes that decode images"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="use the first N of each dataset")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep chunks of remote datasets here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    incoming = read_backbone(args.run)
    if incoming.assumed:
        raise UsageError(
            f"{incoming.source}: a bare file does not say its {', '.join(incoming.assumed)}; "
            "evaluate a run, a checkpoint or a folder with a config.json"
        )
    s3 = incoming.source.s3
    train, val = open_index(args.train, s3=s3), open_index(args.val, s3=s3)
    _refuse_unfit(train, val, limit=args.limit)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = _backbone(incoming, init=args.init, seed=args.seed).to(device)
    features = [
        _features(index, backbone, incoming.spec, device=device, s3=s3, args=args, name=name)
        for name, index in (("train", train), ("val", val))
    ]
    (train_features, train_labels), (val_features, val_labels) = features
    if args.probe == "linear":
        top1 = linear_top1(train_features, train_labels, val_features, val_labels, seed=args.seed)
    else:
        top1 = knn_top1(train_features, train_labels, val_features, val_labels)
    result = {
        "probe": args.probe,
        "top1": top1,
        "init": args.init,
        "step": incoming.source.step,
        "samples": incoming.source.samples,
        "train": train.url,
        "train_identity": train.identity,
        "train_samples": len(train_labels),
        "val": val.url,
        "val_identity": val.identity,
        "val_samples": len(val_labels),
        "num_classes": int(train_labels.max()) + 1,
        "seconds": round(time.monotonic() - started, 3),
    }
    _record(incoming, result)
    if args.json:
        print(json.dumps({"source": incoming.source.url, **result}))
    else:
        what = "the same network, untrained" if args.init == "random" else str(incoming.source)
        print(
            f"{what}: {args.probe} top-1 {100 * top1:.2f} % of {len(val_labels)} images in "
            f"{result['num_classes']} classes, from {len(train_labels)} training images"
        )
    return 0


def _refuse_unfit(train: DatasetIndex, val: DatasetIndex, *, limit: int | None) -> None:
    """UsageError, before any image is read, for two datasets that give no honest number."""
    for index in (train, val):
        if index.num_classes is None:
            raise UsageError(f"{index.url}: has no labels; a probe needs a labelled dataset")
        if index.label_kind == "multi":
            raise UsageError(f"{index.url}: has several labels an image; a probe needs one each")
        if limit is not None and limit < index.num_samples and index.labels_sorted:
            raise UsageError(
                f"{index.url}: is sorted by label, so that its first {limit} samples are of few classes; "
                "leave --limit out, or pack it again with `pretrain data pack`, which shuffles"
            )
    if train.identity == val.identity:
        raise UsageError(f"--train and --val are the same dataset ({val.url}); each image would find itself")
    if train.class_names and val.class_names and train.class_names != val.class_names:
        raise UsageError(
            f"{train.url} and {val.url} name their classes differently "
            f"({len(train.class_names)} and {len(val.class_names)}); label numbers would not mean the same"
        )


def _backbone(incoming: Incoming, *, init: str, seed: int) -> Backbone:
    if init == "random":
        torch.manual_seed(seed)
        return build_backbone(incoming.spec)
    return rebuild(incoming.spec, incoming.backbone)


def _features(
    index: DatasetIndex,
    backbone: Backbone,
    spec: BackboneSpec,
    *,
    device: torch.device,
    s3: S3Settings,
    args: argparse.Namespace,
    name: str,
) -> tuple[Tensor, Tensor]:
    """Features float32 (N, D) and labels int64 (N,) of the dataset's first samples, on the host."""
    reader = ChunkReader(index, cache_dir=args.cache_dir, s3=s3)
    loader = EvalLoader(
        reader=reader,
        transform=EvalTransform(image_size=spec.image_size),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    count = index.num_samples if args.limit is None else min(args.limit, index.num_samples)
    num_batches = -(-count // args.batch_size)
    batches = iter(loader)
    wanted = itertools.islice(batches, num_batches)
    shown = tqdm(wanted, desc=f"{name} features", total=num_batches, unit="batch", disable=None)
    transform = DeviceTransform(mean=spec.mean, std=spec.std)
    try:
        features, labels = extract_features(backbone, cast(Iterable[Batch], shown), transform, device)
    finally:
        cast(Generator[Batch], batches).close()  # ends the workers, which would go on past the limit
        reader.close()
    if loader.unreadable:
        first = loader.unreadable[0].error
        print(f"{name}: {len(loader.unreadable)} images are left out, the first: {first}", file=sys.stderr)
    return features[:count], labels[:count]


def _record(incoming: Incoming, result: dict[str, Any]) -> None:
    """A line in the run's journal; exports have none."""
    if incoming.source.kind != "run":
        return
    folder = Path(incoming.source.url).parent
    if folder.name != CHECKPOINTS:  # a checkpoint that was copied out of its run
        return
    journal = Journal(folder.parent / JOURNAL_NAME, attempt=incoming.source.attempt or 0)
    try:
        journal.append("probe", **result)
    finally:
        journal.close()
