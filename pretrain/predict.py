"""Say what is in images, with a trained classifier.

RUN is a run's folder (its newest checkpoint is taken), one of its checkpoints, or an export with a head. Images are
files, folders (all images below them) or quoted patterns like "photos/**/*.jpg". Each is seen as in validation: its
centre, scaled to the network's size.

A line an image names the classes that the network thinks most probable. With softmax, as most are trained, the
classes' probabilities add up to 1; with sigmoid each class is on its own. A run knows which it was; of an export
softmax is assumed, unless --scores says otherwise.

Exit codes: 0, or 3 when an image could not be read: it is named and left out, and the others are classified. 2 for
wrong usage, also a network without a head.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.data.augment import DeviceTransform, EvalTransform
from pretrain.data.image_files import find_images, read_image
from pretrain.errors import EXIT_FINISHED, DataError, UsageError
from pretrain.formats.incoming import Incoming, read_backbone
from pretrain.formats.loading import rebuild

# B images, S side of the network's input, C classes, K of them told


def run(args: argparse.Namespace) -> int:
    files = find_images(args.images)
    incoming = read_backbone(args.run, weights=args.weights)
    refuse_unfit(incoming)
    classify = Classifier(incoming, sigmoid=is_sigmoid(incoming, args.scores))
    unread = 0
    for batch in _batches(files, args.batch_size):
        pixels: list[Tensor] = []
        failed: dict[Path, str] = {}
        for path in batch:
            try:
                pixels.append(classify.prepared(path))
            except DataError as error:
                failed[path] = str(error)
        scores = iter(classify(torch.stack(pixels))) if pixels else iter(())
        for path in batch:
            if path in failed:
                unread += 1
                print(f"left out: {failed[path]}", file=sys.stderr)
                if args.json:
                    print(json.dumps({"image": str(path), "error": failed[path]}))
            else:
                print(_told(path, next(scores), incoming.spec.class_names, top=args.top, as_json=args.json))
    if unread:
        print(f"{unread} of {len(files)} images could not be read and are left out", file=sys.stderr)
        return DataError.exit_code
    return EXIT_FINISHED


def refuse_unfit(incoming: Incoming) -> None:
    """UsageError for what cannot name a class."""
    if incoming.assumed:
        raise UsageError(
            f"{incoming.source}: a bare file does not say its {', '.join(incoming.assumed)}; "
            "name a run, a checkpoint or a folder with a config.json"
        )
    if not incoming.head:
        raise UsageError(
            f"{incoming.source}: has no class head: it was not trained to classify, or exported with --no-head; "
            "fine-tune it (`pretrain train` with init_from), or measure its features with `pretrain evaluate`"
        )


def is_sigmoid(incoming: Incoming, asked: str | None) -> bool:
    if asked is not None:
        return asked == "sigmoid"
    return incoming.source.config.get("objective", {}).get("loss") == "sigmoid"


class Classifier:
    """A network with its head, on the GPU where there is one."""

    def __init__(self, incoming: Incoming, *, sigmoid: bool) -> None:
        spec = incoming.spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._backbone = rebuild(spec, incoming.backbone).to(self._device)
        self._head = {name: value.to(self._device) for name, value in incoming.head.items()}
        self._transform = EvalTransform(image_size=spec.image_size)
        self._normalise = DeviceTransform(mean=spec.mean, std=spec.std)
        self._sigmoid = sigmoid

    def prepared(self, path: Path) -> Tensor:
        """uint8 (3, S, S), the centre of the image. Raises DataError for what is no image."""
        sample = self._transform(read_image(path), name=str(path))
        return torch.tensor(sample.pixels)

    @torch.inference_mode()
    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Probabilities of the classes, float32 (B, C), on the host."""
        images = self._normalise(pixels_BCHW.to(self._device))
        features = self._backbone.features(images)
        logits = torch.nn.functional.linear(features, self._head["weight"], self._head["bias"])
        return (logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)).float().cpu()


def _batches(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def _told(path: Path, scores_C: Tensor, names: Sequence[str] | None, *, top: int, as_json: bool) -> str:
    values_K, classes_K = scores_C.topk(min(top, len(scores_C)))
    found = [
        {"class": number, "name": names[number] if names else None, "probability": value}
        for value, number in zip(values_K.tolist(), classes_K.tolist(), strict=True)
    ]
    if as_json:
        return json.dumps({"image": str(path), "top": found})
    said = (
        f"{one['name'] or 'class ' + str(one['class'])} {100 * one['probability']:.1f} %" for one in found
    )
    return f"{path}: {', '.join(said)}"
