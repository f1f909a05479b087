"""Make an export folder: sort out, resample, write, check with the consumer's library, then name it.

Called by `pretrain export`, and by train.py for `export.formats`. Nothing stands under the folder's
name until the check has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.errors import CheckpointError, UsageError
from pretrain.formats.card import model_card
from pretrain.formats.check import Check, check_folder
from pretrain.formats.check_images import CheckImages, images_for_check
from pretrain.formats.files import read_json, write_json
from pretrain.formats.hugging_face import write_hugging_face
from pretrain.formats.incoming import RECORD, Incoming, Source, read_backbone
from pretrain.formats.limits import why_not
from pretrain.formats.loading import rebuild
from pretrain.formats.naming import backbone_shapes
from pretrain.formats.place import Place
from pretrain.formats.plain import write_plain
from pretrain.formats.timm import write_timm
from pretrain.models.pos_embed import resample_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.storage.files import sync

FORMATS = ("timm", "hf", "safetensors")
WRITERS = {"timm": write_timm, "hf": write_hugging_face, "safetensors": write_plain}
Format = Literal["timm", "hf", "safetensors"]
CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and where. left_out: tensors of the source that are not in the export, and why."""

    folder: str  # or its URL
    spec: BackboneSpec
    check: Check
    image_origin: str
    resampled: str | None  # "14×14 to 16×16 patches"
    left_out: dict[str, str]
    source: str


def export_backbone(
    source: str | Path,
    out: str | Path,
    *,
    format: Format,
    image_size: int | None = None,
    with_head: bool | None = None,
    images_url: str | None = None,
    weights: str | None = None,
    license: str | None = None,
) -> Exported:
    """Write `source` (a run, its mirror, a checkpoint or another export) to the folder `out`, or the place in a bucket
    that it names, and check it before it stands there.

    image_size: pixels; position embeddings are resampled by the consumer's own rule. with_head: False leaves a
    class head out, True asks for one, None takes what there is. images_url: a dataset to take the images of the check
    from. weights: "ema" or "raw", see `read_backbone`. license: for the card, instead of what the recipe says.

    One copy of the weights is in memory, here and then in the process that checks. Raises UsageError for an `out` that
    is not empty, a source that is not there, a size that does not fit, a head that is not there, or a model that the
    format cannot hold; CheckpointError for a damaged source or an export that failed its check. `out` is then as it
    was.
    """
    place = Place.of(out)
    place.refuse_occupied()
    incoming = read_backbone(source, weights=weights)
    if incoming.assumed:
        raise UsageError(
            f"{incoming.source}: a bare file does not say its {', '.join(incoming.assumed)}; "
            "export from a run, a checkpoint or a folder with a config.json"
        )
    if reason := why_not(format, incoming.spec, head=False):
        raise UsageError(f"--format {format}: {reason}")
    if with_head and not incoming.head:
        raise UsageError(f"--with-head: {incoming.source} holds no class head; leave it out")
    spec, tensors, resampled = at_size(incoming, image_size, rule=format)
    left_out, head, origin = dict(incoming.left_out), incoming.head, incoming.source
    del incoming  # with it go the weights as soon as they are written
    if head and with_head is False:
        left_out.update({f"head.{name}": "--no-head" for name in head})
        head = {}
    if not head:
        spec = replace(spec, num_classes=None, class_names=None)
    if reason := why_not(format, spec, head=bool(head)):
        raise UsageError(f"--format {format}: {reason}")
    chosen = images_for_check(spec, origin, url=images_url)

    with place.building() as building:
        fraction = chosen.crop_fraction
        WRITERS[format](building, tensors, spec, head=head or None, crop_fraction=fraction)
        features, logits = _reference(spec, tensors, head, chosen)
        del tensors, head
        check = check_folder(
            building, format=format, spec=spec, images=chosen.images, features=features, logits=logits
        )
        license = license or origin.license
        facts = {"resampled": resampled, "left_out": left_out, "license": license}
        _write_record(building, format, origin, check, chosen, facts)
        card = model_card(
            spec,
            origin,
            format=format,
            check=check,
            image_origin=chosen.origin,
            crop_fraction=fraction,
            resampled=resampled,
            left_out=left_out,
            license=license,
        )
        (building / CARD).write_text(card, encoding="utf-8")
        sync(building / CARD)
    return Exported(
        folder=place.url,
        spec=spec,
        check=check,
        image_origin=chosen.origin,
        resampled=resampled,
        left_out=left_out,
        source=str(origin),
    )


def at_size(
    incoming: Incoming, image_size: int | None, *, rule: Format
) -> tuple[BackboneSpec, dict[str, Tensor], str | None]:
    spec, weights = incoming.spec, dict(incoming.backbone)
    if image_size is None or image_size == spec.image_size:
        return spec, weights, None
    if image_size < spec.patch_size or image_size % spec.patch_size:
        nearest = max(1, round(image_size / spec.patch_size)) * spec.patch_size
        raise UsageError(
            f"--image-size {image_size} is not a multiple of the patch size {spec.patch_size}; take {nearest}"
        )
    sized = replace(spec, image_size=image_size)
    if spec.name != "vit":
        if backbone_shapes(sized) != backbone_shapes(spec):
            raise UsageError(
                f"--image-size {image_size}: a stage would be smaller than its window at one size and not at the "
                "other; train at that size, or keep the one it has"
            )
        if spec.name == "swin_v2" and sized.position_windows != spec.position_windows:
            # a stage that was smaller than a window has a larger one now, and goes on to measure by what it had
            sized = replace(sized, pretrained_window_sizes=spec.position_windows)
        return sized, weights, None
    weights["pos_embed"] = resample_pos_embed(
        weights["pos_embed"], sized.grid, spec.num_position_prefix, rule="hf" if rule == "hf" else "timm"
    )
    return sized, weights, f"{spec.grid}×{spec.grid} to {sized.grid}×{sized.grid} patches"


def _reference(
    spec: BackboneSpec, weights: Mapping[str, Tensor], head: Mapping[str, Tensor], chosen: CheckImages
) -> tuple[Tensor, Tensor | None]:
    """What this project's model computes of the images: features (B, D), and logits (B, K) where there is a head."""
    model = rebuild(spec, weights)
    with torch.inference_mode():
        # one by one: beside a huge model's weights, what several images need would be seen
        features = torch.cat([model.features(image) for image in chosen.images.split(1)])
        logits = torch.nn.functional.linear(features, head["weight"], head["bias"]) if head else None
    return features, logits


def _write_record(
    folder: Path, format: Format, source: Source, check: Check, chosen: CheckImages, facts: Mapping[str, Any]
) -> None:
    record = {
        "format": format,
        **asdict(check),
        "images": {"count": len(chosen.images), "from": chosen.origin},
        "source": {
            "kind": source.kind,
            "url": source.url,
            "step": source.step,
            "samples": source.samples,
            "dataset_identity": source.dataset_identity,
            "weights": source.weights,
        },
        **facts,
        "recipe": dict(source.recipe),
        "probes": [dict(probe) for probe in source.probes],
    }
    write_json(folder / RECORD, record)


def exported_step(folder: Path) -> int | None:
    """The step that an export of ours in `folder` is of; None when there is none."""
    try:
        record = read_json((folder / RECORD).read_bytes(), where=str(folder / RECORD))
        return int(record["source"]["step"])
    except (OSError, KeyError, TypeError, CheckpointError):
        return None
