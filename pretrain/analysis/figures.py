"""All figures of a network: what is found, over any number of ranks, and how it is written down.

Called by `pretrain analyze`, and by evaluations.py while a run trains. picture.py draws.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.analysis.attention import AttentionDistances, HeadDistance
from pretrain.analysis.choice import What
from pretrain.analysis.embeddings import (
    PrincipalFilters,
    position_similarity,
    principal_filters,
    read_embeddings,
)
from pretrain.analysis.picture import draw_attention_distance, draw_filters, draw_positions
from pretrain.models.backbone import Backbone
from pretrain.models.vit import VisionTransformer

Told = Callable[[], None]  # at each batch


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known of a network; None for what was not asked for. images: that attention was looked at in."""

    heads: Sequence[HeadDistance] | None = None
    images: int = 0
    image_size: int
    similarity: Tensor | None = None  # (G, G, G, G), as of position_similarity
    filters: PrincipalFilters | None = None


def analyze(
    backbone: Backbone,
    what: Sequence[What],
    *,
    batches: Iterable[Mapping[str, Any]],
    device_transform: Callable[[Tensor], Tensor],
    device: torch.device,
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    each_batch: Told = lambda: None,
) -> Findings:
    """The same findings on every rank; all ranks together, with as many batches each.

    The backbone must be on `device`, and is as it was afterwards; no random number is drawn. batches: this rank's
    part of the images, as dictionaries of images uint8 (B, 3, S, S) and weights (B,), on the host; only gone through
    for attention distances. reading: the context of one forward (`Engine.reading`).
    """
    heads, images = None, 0
    if "attention-distance" in what:
        distances = AttentionDistances(backbone, device)
        for batch in batches:
            each_batch()
            pixels = device_transform(batch["images"].to(device, non_blocking=True))
            distances.add(pixels, batch["weights"], reading=reading)
        heads, images = distances.over_ranks()
    similarity, filters = None, None
    if "position-embedding" in what or "patch-filters" in what:
        pos_embed, weight = read_embeddings(backbone, device, reading=reading)
        if "patch-filters" in what:
            filters = principal_filters(weight)
        if "position-embedding" in what:
            assert pos_embed is not None, "a network without any was refused"
            assert isinstance(backbone, VisionTransformer), "only a ViT has them"
            similarity = position_similarity(pos_embed, backbone.num_position_prefix)
    return Findings(
        heads=heads,
        images=images,
        image_size=backbone.image_size,
        similarity=similarity,
        filters=filters,
    )


def write(findings: Findings, folder: Path, *, title: str) -> list[Path]:
    """A CSV file and a picture of each finding, into `folder`, which is made; returns the pictures.

    title: whose they are. Raises OSError for what cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    if findings.heads is not None:
        _write_csv(folder / "attention-distance.csv", *_attention_rows(findings.heads))
        pictures.append(folder / "attention-distance.png")
        of = f"{findings.images} image{'s' * (findings.images != 1)} of {findings.image_size} pixels a side"
        draw_attention_distance(findings.heads, pictures[-1], title=title, of=of)
    if findings.similarity is not None:
        _write_csv(folder / "position-embedding.csv", *_position_rows(findings.similarity))
        pictures.append(folder / "position-embedding.png")
        draw_positions(findings.similarity.numpy(), pictures[-1], title=title)
    if findings.filters is not None:
        _write_csv(folder / "patch-filters.csv", *_filter_rows(findings.filters))
        pictures.append(folder / "patch-filters.png")
        filters = findings.filters
        draw_filters(filters.filters.numpy(), filters.shares.numpy(), pictures[-1], title=title)
    return pictures


def _attention_rows(heads: Sequence[HeadDistance]) -> tuple[list[str], Iterable[list[Any]]]:
    names = ["layer", "head", "mean_distance_pixels", "standard_deviation_over_images_pixels"]
    names += ["share_to_prefix_tokens", "uniform_attention_pixels"]
    rows = (
        [
            head.layer + 1,
            head.head + 1,
            *map(_number, (head.mean, head.deviation, head.prefix_share, head.uniform)),
        ]
        for head in heads
    )
    return names, rows


def _position_rows(similarity: Tensor) -> tuple[list[str], Iterable[list[Any]]]:
    """A row a patch, a column a patch: rows and columns of patches count from 1."""
    G = len(similarity)
    places = [(row + 1, column + 1) for row in range(G) for column in range(G)]
    names = ["row", "column", *(f"cosine_to_{row}_{column}" for row, column in places)]
    flat = similarity.reshape(G * G, G * G).tolist()
    return names, ([*place, *map(_number, line)] for place, line in zip(places, flat, strict=True))


def _filter_rows(found: PrincipalFilters) -> tuple[list[str], Iterable[list[Any]]]:
    _, C, height, width = found.filters.shape
    channels = "rgb" if C == 3 else [f"channel{c}_" for c in range(C)]
    names = ["component", "share_of_variance"]
    names += [
        f"{c}_{row + 1}_{column + 1}" for c in channels for row in range(height) for column in range(width)
    ]
    lines = zip(found.shares.tolist(), found.filters.flatten(1).tolist(), strict=True)
    return names, ([i + 1, _number(share), *map(_number, line)] for i, (share, line) in enumerate(lines))


def _number(value: float) -> str:
    return f"{value:.7g}"


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    os.replace(partial, path)
