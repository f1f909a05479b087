"""Draw what a masked autoencoder sees and what it makes of it.

RUN is the run of objective.name=mae or simmim (its newest checkpoint is taken), or one of its checkpoints; URL
any indexed dataset. Each row of the picture is an image, the patches that were left of it, and the
reconstruction, in which the visible patches are the image's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from pretrain.assemble import build_objective
from pretrain.assemble_data import build_device_transform, build_reader
from pretrain.checkpoint.load import find_newest, load_weights, read_manifest
from pretrain.config.load import parse_config
from pretrain.data.augment import EvalTransform
from pretrain.data.index import open_index
from pretrain.data.loader import EvalLoader
from pretrain.derived import s3_settings
from pretrain.errors import DataError, UsageError
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM

GAP = 4  # pixels between pictures
SMALLEST_SIDE = 112  # smaller images are enlarged, their pixels kept visible


def run(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not args.out.parent.is_dir():
        raise UsageError(f"{args.out}: give a .png file in a folder that is there")
    if args.images < 1:
        raise UsageError(f"--images {args.images}: at least 1")
    if not Path(args.run).exists():
        raise UsageError(f"{args.run}: there is no such run; give a run's folder or one of its checkpoints")
    folder = find_newest(args.run)
    config = parse_config(read_manifest(folder).config, source=str(folder))
    if config.objective.name not in ("mae", "simmim"):
        raise UsageError(
            f"{args.run}: was trained with objective.name={config.objective.name}, which masks nothing"
        )
    index = open_index(args.url, s3=s3_settings(config))
    objective = build_objective(config, num_classes=None)
    assert isinstance(objective, MAE | SimMIM), "the config says so"
    missing, unexpected = objective.load_state_dict(load_weights(folder), strict=False)
    buffers = {name for name, _ in objective.named_buffers()}  # they follow from the config
    assert not unexpected, f"{folder} holds parameters that its config does not: {unexpected}"
    assert set(missing) <= buffers, f"{folder} lacks {missing}"

    count = min(args.images, index.num_samples)
    transform_host = EvalTransform(image_size=config.model.image_size)
    loader = EvalLoader(reader=build_reader(config, index), transform=transform_host, batch_size=count)
    transform = build_device_transform(config)
    batch = next(iter(loader))
    if loader.unreadable:
        raise DataError(loader.unreadable[0].error)
    images = transform(batch["images"])
    masked, reconstructed = objective.reconstruct(images, batch["positions"])

    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    columns = torch.stack([images, masked, reconstructed], dim=1) * std + mean
    _draw((columns.clamp(0, 1) * 255).round().to(torch.uint8)).save(args.out)
    print(f"{args.out}: {count} images of {args.url}, what was seen of them, and {folder}'s reconstructions")
    return 0


def _draw(pictures: torch.Tensor) -> Image.Image:
    """uint8 (rows, 3, 3, S, S) as one image."""
    rows, columns, _, S, _ = pictures.shape
    side = S * max(1, -(-SMALLEST_SIDE // S))
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), "white")
    for row in range(rows):
        for column in range(columns):
            picture = Image.fromarray(pictures[row, column].permute(1, 2, 0).numpy())
            place = (GAP + column * (side + GAP), GAP + row * (side + GAP))
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), place)
    return sheet
