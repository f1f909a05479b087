"""Make an export folder: sort out, resample, write, check with the consumer's library, then name it.

Called by `pretrain export`, and by train.py for `export.formats`. Nothing stands under the folder's
name until the check has passed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pretrain.errors import CheckpointError, UsageError
from pretrain.formats.check import Check, check_folder
from pretrain.formats.check_images import CheckImages, images_for_check
from pretrain.formats.files import read_json, write_json
from pretrain.formats.hugging_face import write_hugging_face
from pretrain.formats.incoming import RECORD, Incoming, read_backbone
from pretrain.formats.limits import why_not
from pretrain.formats.loading import rebuild
from pretrain.formats.naming import backbone_shapes
from pretrain.formats.timm import write_timm
from pretrain.models.pos_embed import resample_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.storage.files import open_to_readers

FORMATS = ("timm", "hf")
WRITERS = {"timm": write_timm, "hf": write_hugging_face}
Format = Literal["timm", "hf"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. left_out: tensors of the source that are not in the export, and why."""

    folder: Path
    spec: BackboneSpec
    check: Check
    image_origin: str
    resampled: str | None  # "14×14 to 16×16 patches"
    left_out: dict[str, str]
    source: str


def export_backbone(
    source: str | Path,
    out: Path,
    *,
    format: Format,
    image_size: int | None = None,
    with_head: bool = True,
    images_url: str | None = None,
    weights: str | None = None,
) -> Exported:
    """Write `source` (a run, a checkpoint or another export) to the folder `out` and check it there.

    image_size: pixels; position embeddings are resampled by the consumer's own rule. with_head=False
    leaves a class head out. images_url: a dataset to take the images of the check from. weights: "ema" or
    "raw", see `read_backbone`.

    Raises UsageError for an `out` that is not empty, a source that is not there, a size that does not
    fit, or a model that the format cannot hold; CheckpointError for a damaged source or an export that
    failed its check. `out` is then as it was.
    """
    out = Path(out)
    _refuse_occupied(out)
    incoming = read_backbone(source, weights=weights)
    if incoming.assumed:
        raise UsageError(
            f"{incoming.source}: a bare file does not say its {', '.join(incoming.assumed)}; "
            "export from a run, a checkpoint or a folder with a config.json"
        )
    if reason := why_not(format, incoming.spec, head=False):
        raise UsageError(f"--format {format}: {reason}")
    spec, tensors, resampled = _at_size(incoming, image_size, rule=format)
    left_out = dict(incoming.left_out)
    head = incoming.head
    if head and not with_head:
        left_out.update({f"head.{name}": "--no-head" for name in head})
        head = {}
    if not head:
        spec = replace(spec, num_classes=None, class_names=None)
    if reason := why_not(format, spec, head=bool(head)):
        raise UsageError(f"--format {format}: {reason}")
    chosen = images_for_check(spec, incoming.source, url=images_url)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error}; name another folder") from error
    try:
        open_to_readers(building)
        WRITERS[format](building, tensors, spec, head=head or None, crop_fraction=chosen.crop_fraction)
        check = _check(building, format, spec, tensors, head, chosen)
        _write_record(building, format, incoming, check, chosen, left_out, resampled)
        os.replace(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return Exported(
        folder=out,
        spec=spec,
        check=check,
        image_origin=chosen.origin,
        resampled=resampled,
        left_out=left_out,
        source=str(incoming.source),
    )


def _refuse_occupied(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out}: is already there; name a folder that does not exist or is empty")


def _at_size(
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
        return sized, weights, None
    weights["pos_embed"] = resample_pos_embed(
        weights["pos_embed"], sized.grid, spec.num_position_prefix, rule=rule
    )
    return sized, weights, f"{spec.grid}×{spec.grid} to {sized.grid}×{sized.grid} patches"


def _check(
    folder: Path,
    format: Format,
    spec: BackboneSpec,
    weights: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    chosen: CheckImages,
) -> Check:
    model = rebuild(spec, weights)
    with torch.inference_mode():
        features = model.features(chosen.images)
        logits = torch.nn.functional.linear(features, head["weight"], head["bias"]) if head else None
    return check_folder(
        folder, format=format, spec=spec, images=chosen.images, features=features, logits=logits
    )


def _write_record(
    folder: Path,
    format: Format,
    incoming: Incoming,
    check: Check,
    chosen: CheckImages,
    left_out: Mapping[str, str],
    resampled: str | None,
) -> None:
    source = incoming.source
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
        "resampled": resampled,
        "left_out": dict(left_out),
    }
    write_json(folder / RECORD, record)


def exported_step(folder: Path) -> int | None:
    """The step that an export of ours in `folder` is of; None when there is none."""
    try:
        record = read_json((folder / RECORD).read_bytes(), where=str(folder / RECORD))
        return int(record["source"]["step"])
    except (OSError, KeyError, TypeError, CheckpointError):
        return None
