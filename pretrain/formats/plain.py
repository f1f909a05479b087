"""Write and read a plain folder: tensors, and a config.json that says what they are, for no library in particular.

    model.safetensors   float32, in timm's names: patch_embed.proj.weight, blocks.0.attn.qkv.weight (query, key and
                        value, one above the other), …; of a class head head.weight (K, D) and head.bias (K,)
    config.json         {"format": "vit-pretrain", "format_version": 1, "crop_fraction": part of the resized side that
                        is kept, "backbone": the fields of pretrain.models.spec.BackboneSpec}

It holds every backbone that there is here, also those for which timm and transformers have no class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.formats.files import write_json, write_tensors
from pretrain.models.spec import BackboneSpec

FORMAT, VERSION = "vit-pretrain", 1


def write_plain(
    out_dir: Path,
    weights: Mapping[str, Tensor],
    spec: BackboneSpec,
    *,
    head: Mapping[str, Tensor] | None = None,
    crop_fraction: float = 1.0,
) -> None:
    """Write model.safetensors and config.json into out_dir, which exists.

    weights: the backbone's tensors, float32, in timm's names. head: {"weight": (K, D), "bias": (K,)}.
    """
    named = {f"head.{name}": value for name, value in (head or {}).items()}
    described = spec.to_dict() if head else {**spec.to_dict(), "num_classes": None, "class_names": None}
    config = {
        "format": FORMAT,
        "format_version": VERSION,
        "crop_fraction": crop_fraction,
        "backbone": described,
    }
    write_tensors(out_dir / "model.safetensors", {**weights, **named})
    write_json(out_dir / "config.json", config)


def is_plain(config: Mapping[str, Any]) -> bool:
    return config.get("format") == FORMAT


def read_plain_config(config: Mapping[str, Any], *, where: str) -> BackboneSpec:
    """The spec of a plain folder; CheckpointError where it does not say one, or is of another version."""
    if config.get("format_version") != VERSION:
        raise CheckpointError(
            f"{where}: config.json is of format_version {config.get('format_version')!r}, this version reads {VERSION}"
        )
    described = config.get("backbone")
    if not isinstance(described, dict):
        raise CheckpointError(f"{where}: config.json lacks `backbone`, which describes the model")
    return BackboneSpec.from_dict(described)
