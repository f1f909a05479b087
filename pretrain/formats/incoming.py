"""Read a backbone: from a run, a checkpoint, an export, or a plain safetensors file.

`init_from:`, `pretrain evaluate` and `pretrain export` start here. Nothing is unpickled, and every
tensor that was found ends up in the backbone, in the class head, or named with a reason.
loading.py puts what was read into a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.load import find_newest, load_weights
from pretrain.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST_NAME, Manifest, read_manifest
from pretrain.errors import CheckpointError, StorageError, UsageError
from pretrain.formats.files import read_json, read_tensors
from pretrain.formats.hugging_face import from_hugging_face, is_hugging_face, read_hugging_face_config
from pretrain.formats.naming import Parts, sort_out, why_left_out
from pretrain.formats.timm import from_timm, is_timm, read_timm_config
from pretrain.models.pos_embed import sincos_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.storage import S3Settings, Storage, is_remote, join_url, open_storage, split_url

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".npz")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
RECORD = "export.json"  # what our own exports say about their origin


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a backbone came from. kind is "run", "timm", "hf" or "safetensors"; step, samples, attempt and
    dataset_identity are None where they are not known; config is a run's resolved recipe or {}. weights: "ema" or
    "raw" of a run, None where it is not known."""

    kind: str
    url: str
    step: int | None = None
    samples: int | None = None
    attempt: int | None = None
    dataset_identity: str | None = None
    config: Mapping[str, Any]
    weights: str | None = None

    @property
    def s3(self) -> S3Settings:
        """How the run reached its bucket."""
        storage = self.config.get("storage", {})
        return S3Settings(
            addressing_style=storage.get("addressing_style"), checksums=storage.get("checksums")
        )

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.url} ({self.kind}{step}{', average of the weights' if self.weights == EMA else ''})"


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """A backbone as it was read: float32 tensors on the CPU in timm's names, without a prefix.

    head is {} or {"weight": (K, D), "bias": (K,)}; left_out names all other tensors, with reasons.
    assumed names fields of spec that the source did not state (a bare safetensors file has no
    num_heads, mean or std).
    """

    spec: BackboneSpec
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: dict[str, str]
    source: Source
    assumed: tuple[str, ...] = ()


def read_backbone(url_or_path: str | Path, *, weights: str | None = None) -> Incoming:
    """Read a run folder, a checkpoint folder, a timm or transformers export, or a .safetensors file.

    Exports and files may be s3:// URLs. weights: "ema" or "raw"; of a checkpoint that holds an average of the weights,
    the average is taken unless "raw" is asked for. Raises UsageError when there is nothing of the kind there, for a
    pickle, and where an average is asked for that is not there; CheckpointError when what is there is damaged,
    incomplete or describes another model.
    """
    url = str(url_or_path).rstrip("/")
    if url.lower().endswith(PICKLES):
        raise UsageError(
            f"{url}: is a pickle, which can run any code when it is opened; load it where you trust it "
            "and save its tensors with safetensors.torch.save_file"
        )
    if not is_remote(url):
        path = Path(url.removeprefix("file://"))
        if not path.exists():
            raise UsageError(
                f"{url}: there is no such file or folder; give a run, a checkpoint or an export. Where a run has a "
                "checkpoint.mirror, `pretrain checkpoints MIRROR --bring-back RUN` makes its folder anew"
            )
        if path.is_dir() and ((path / MANIFEST_NAME).is_file() or (path / CHECKPOINTS).is_dir()):
            return _read_run(path, weights)
        if weights == EMA:
            raise UsageError(
                f"{url}: is no run, only runs hold an average of the weights; leave --weights out"
            )
        if path.is_file() and not (path.name == WEIGHTS and (path.parent / CONFIG).is_file()):
            return _read_bare_file(path, url)
        folder = open_storage(str(path.parent if path.is_file() else path))
    elif weights == EMA:
        raise UsageError(f"{url}: only runs on a disk hold an average of the weights; leave --weights out")
    elif url.endswith(".safetensors"):
        parent, name = split_url(url)
        folder = open_storage(parent)
        if name != WEIGHTS or not folder.exists(CONFIG):
            return _read_bare_file(_fetch(folder, name), url)
    else:
        folder = open_storage(url)
    return _read_export(folder)


def _fetch(folder: Storage, name: str) -> Path | bytes:
    """The file itself where it is local, else its bytes; UsageError when it cannot be had at the start."""
    try:
        return folder.local_path(name) or folder.read(name)
    except StorageError as error:
        raise UsageError(f"{join_url(folder.url, name)}: {error}") from error


def _read_run(path: Path, weights: str | None) -> Incoming:
    step_folder = find_newest(path)
    manifest = read_manifest(step_folder)
    where = str(step_folder)
    averages = any(piece.kind == EMA for slices in manifest.files.values() for piece in slices)
    if weights == EMA and not averages:
        raise UsageError(
            f"{where}: holds no average of the weights (optim.ema_decay was not set); leave --weights out"
        )
    kind = EMA if averages and weights != "raw" else "weight"
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, value in load_weights(step_folder, kind=kind).items():
        if name.startswith(("backbone.", "head.")):
            tensors[name.removeprefix("backbone.")] = value
        else:
            left_out[name] = why_left_out(name) or "the objective's own"
    head = tensors.get("head.weight")
    spec = _spec_of_run(manifest, num_classes=None if head is None else head.shape[0], where=where)
    if spec.position_embedding == "sincos":  # fixed, so a checkpoint of trained parameters lacks it
        fixed = sincos_pos_embed(spec.grid, spec.embed_dim, num_prefix_tokens=spec.num_position_prefix)
        tensors.setdefault("pos_embed", fixed)
    parts = sort_out(tensors, spec, where=where)
    source = Source(
        kind="run",
        url=where,
        step=manifest.step,
        samples=manifest.samples,
        attempt=manifest.attempt,
        dataset_identity=manifest.dataset.get("identity"),
        config=manifest.config,
        weights=EMA if kind == EMA else "raw",
    )
    return _incoming(spec, parts, source, left_out)


def _spec_of_run(manifest: Manifest, *, num_classes: int | None, where: str) -> BackboneSpec:
    """The backbone that a checkpoint's resolved recipe builds; num_classes is its head's, if any."""
    try:
        names = manifest.dataset.get("class_names")
        return BackboneSpec.of_recipe(
            manifest.config["model"],
            manifest.config["data"],
            num_classes=num_classes,
            # a head wider than the dataset's classes (objective.num_classes) has no names to give
            class_names=names if num_classes and names and len(names) == num_classes else None,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: the manifest's config lacks {error}; it is no run of this project's"
        ) from error


def _read_export(folder: Storage) -> Incoming:
    where = folder.url
    try:
        has_config, has_weights = folder.exists(CONFIG), folder.exists(WEIGHTS)
    except StorageError as error:
        raise UsageError(f"{where}: {error}") from error
    if not (has_config and has_weights):
        if folder.exists("run.json") and not has_weights:
            raise UsageError(
                f"{where}: is the mirror of a run; `pretrain checkpoints {where} --bring-back RUN` makes its folder "
                "anew, RUN, which can be given here"
            )
        lacks = " and ".join(name for name, has in ((CONFIG, has_config), (WEIGHTS, has_weights)) if not has)
        raise UsageError(
            f"{where}: holds neither a run's checkpoints nor an export (no {lacks}); give a run, a "
            "checkpoint, a folder that `pretrain export` wrote, or a .safetensors file"
        )
    config = _read_json(folder, CONFIG)
    weights = _fetch(folder, WEIGHTS)
    tensors = read_tensors(weights, where=join_url(where, WEIGHTS))
    if is_hugging_face(config):
        kind, preprocessor = "hf", "preprocessor_config.json"
        normalise = _read_json(folder, preprocessor) if folder.exists(preprocessor) else None
        spec = read_hugging_face_config(config, normalise, where=where)
        tensors = from_hugging_face(tensors, spec)
    elif is_timm(config):
        kind, spec = "timm", read_timm_config(config, where=where)
        tensors = from_timm(tensors)
    else:
        raise CheckpointError(
            f"{where}: {CONFIG} is neither timm's nor transformers'; it names no architecture"
        )
    parts = sort_out(tensors, spec, where=where)
    record = _read_json(folder, RECORD).get("source", {}) if folder.exists(RECORD) else {}
    source = Source(
        kind=kind,
        url=where,
        step=record.get("step"),
        samples=record.get("samples"),
        dataset_identity=record.get("dataset_identity"),
        config={},
    )
    return _incoming(spec, parts, source, {})


def _read_json(folder: Storage, name: str) -> dict[str, Any]:
    return read_json(folder.read(name), where=join_url(folder.url, name))


def _read_bare_file(content: Path | bytes, url: str) -> Incoming:
    """A safetensors file alone: sizes are read off the tensors; heads and normalisation are assumed."""
    tensors = {
        name.removeprefix("backbone."): value for name, value in read_tensors(content, where=url).items()
    }
    spec = _spec_of_tensors(tensors, where=url)
    if _hugging_face_names(tensors):
        tensors = from_hugging_face(tensors, spec)
    parts = sort_out(tensors, spec, where=url)
    source = Source(kind="safetensors", url=url, config={})
    return _incoming(spec, parts, source, {}, assumed=("num_heads", "mean", "std"))


def _hugging_face_names(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix("vit.") == "embeddings.cls_token" for name in tensors)


def _spec_of_tensors(tensors: Mapping[str, Tensor], *, where: str) -> BackboneSpec:
    pattern = r"(?:vit\.)?(?:blocks|encoder\.layer|layers)\.(\d+)\..*(?:fc1|intermediate\.dense)\.weight"
    mlp_dims = {
        int(m[1]): value.shape[0] for name, value in tensors.items() if (m := re.fullmatch(pattern, name))
    }
    patch = _first(tensors, "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    positions = _first(tensors, "pos_embed", "embeddings.position_embeddings")
    if not mlp_dims or patch is None or patch.ndim != 4 or positions is None or positions.ndim != 3:
        raise CheckpointError(
            f"{where}: holds no vision transformer in timm's or transformers' names "
            "(patch_embed.proj.weight, pos_embed, blocks.0.mlp.fc1.weight …)"
        )
    D, patch_size = patch.shape[0], patch.shape[-1]
    return BackboneSpec(
        image_size=patch_size * max(math.isqrt(positions.shape[1] - 1), 1),
        patch_size=patch_size,
        embed_dim=D,
        depth=max(mlp_dims) + 1,
        num_heads=1,
        mlp_ratio=max(mlp_dims.values()) / D,
        pooling="avg" if "fc_norm.weight" in tensors else "cls",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def _first(tensors: Mapping[str, Tensor], timm_name: str, other_name: str) -> Tensor | None:
    return next((tensors[n] for n in (timm_name, other_name, f"vit.{other_name}") if n in tensors), None)


def _incoming(
    spec: BackboneSpec,
    parts: Parts,
    source: Source,
    left_out: Mapping[str, str],
    assumed: tuple[str, ...] = (),
) -> Incoming:
    if parts.head and spec.num_classes is None:
        spec = replace(spec, num_classes=parts.head["weight"].shape[0])
    elif not parts.head:
        spec = replace(spec, num_classes=None, class_names=None)
    return Incoming(
        spec=spec,
        backbone={name: value.float() for name, value in parts.backbone.items()},
        head={name: value.float() for name, value in parts.head.items()},
        left_out={**left_out, **parts.left_out},
        source=source,
        assumed=assumed,
    )
