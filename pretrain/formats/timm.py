"""Write and read timm's folders: `timm.create_model("local-dir:OUT", pretrained=True)`.

Our own parameter names are timm's, so the work is in config.json: every argument of the model is
written out, so that sizes which timm has no name for load too, and the images' mean and std are
given, because timm's default for a ViT is Inception's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.formats.files import write_json, write_tensors
from pretrain.models.spec import BackboneSpec

# (embed_dim, depth, num_heads, mlp_dim, patch_size): timm's name. What is not here borrows the
# base model's entry point; model_args overrides all of its sizes.
ARCHITECTURES = {
    (192, 12, 3, 768, 16): "vit_tiny_patch16_224",
    (384, 12, 6, 1536, 8): "vit_small_patch8_224",
    (384, 12, 6, 1536, 16): "vit_small_patch16_224",
    (384, 12, 6, 1536, 32): "vit_small_patch32_224",
    (768, 12, 12, 3072, 8): "vit_base_patch8_224",
    (768, 12, 12, 3072, 16): "vit_base_patch16_224",
    (768, 12, 12, 3072, 32): "vit_base_patch32_224",
    (1024, 24, 16, 4096, 14): "vit_large_patch14_224",
    (1024, 24, 16, 4096, 16): "vit_large_patch16_224",
    (1024, 24, 16, 4096, 32): "vit_large_patch32_224",
    (1280, 32, 16, 5120, 14): "vit_huge_patch14_224",
    (1408, 40, 16, 6144, 14): "vit_giant_patch14_224",
}
ANY_SIZE = "vit_base_patch16_224"
POOLING = {"cls": "token", "avg": "avg"}


def timm_config(spec: BackboneSpec, *, head: bool, crop_fraction: float) -> dict[str, Any]:
    """The contents of config.json. crop_fraction is the part of the resized side that is kept."""
    size = (spec.embed_dim, spec.depth, spec.num_heads, spec.mlp_dim, spec.patch_size)
    num_classes = (spec.num_classes or 0) if head else 0
    config: dict[str, Any] = {
        "architecture": ARCHITECTURES.get(size, ANY_SIZE),
        "num_classes": num_classes,
        "num_features": spec.embed_dim,
        "global_pool": POOLING[spec.pooling],
    }
    if head and spec.class_names is not None:
        config["label_names"] = list(spec.class_names)
    config["model_args"] = {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "mlp_ratio": _ratio_for(spec.embed_dim, spec.mlp_dim),
        "class_token": True,
        "global_pool": POOLING[spec.pooling],
    }
    config["pretrained_cfg"] = {
        "tag": "vit-pretrain",
        "custom_load": False,
        "input_size": [3, spec.image_size, spec.image_size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": crop_fraction,
        "crop_mode": "center",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return config


def _ratio_for(embed_dim: int, mlp_dim: int) -> float:
    """The ratio that gives mlp_dim again after timm's int(embed_dim * ratio), which cuts off."""
    ratio = mlp_dim / embed_dim
    return ratio if int(embed_dim * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def write_timm(
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
    tensors = dict(weights)
    for name, value in (head or {}).items():
        tensors[f"head.{name}"] = value
    write_tensors(out_dir / "model.safetensors", tensors)
    write_json(out_dir / "config.json", timm_config(spec, head=bool(head), crop_fraction=crop_fraction))


def is_timm(config: Mapping[str, Any]) -> bool:
    return "architecture" in config and "model_type" not in config


def read_timm_config(config: Mapping[str, Any], *, where: str) -> BackboneSpec:
    """The spec of a timm folder that writes its arguments out, as ours do; else CheckpointError."""
    arguments = config.get("model_args") or {}
    data = config.get("pretrained_cfg") or {}
    needed = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    if missing := [name for name in needed if name not in arguments]:
        raise CheckpointError(
            f"{where}: model_args in config.json lacks {', '.join(missing)}; only folders whose "
            "arguments are written out, as `pretrain export` does, can be read"
        )
    pooling = {name: ours for ours, name in POOLING.items()}.get(arguments.get("global_pool", "token"))
    if pooling is None or not arguments.get("class_token", True):
        raise CheckpointError(
            f"{where}: pooling {arguments.get('global_pool')!r} with class_token="
            f"{arguments.get('class_token', True)} is no backbone of ours; token or avg with a class token is"
        )
    embed_dim = arguments["embed_dim"]
    return BackboneSpec.from_dict(
        {
            "image_size": arguments["img_size"],
            "patch_size": arguments["patch_size"],
            "embed_dim": embed_dim,
            "depth": arguments["depth"],
            "num_heads": arguments["num_heads"],
            "mlp_ratio": int(embed_dim * arguments.get("mlp_ratio", 4.0)) / embed_dim,  # timm cuts off
            "pooling": pooling,
            "num_classes": config.get("num_classes") or None,
            "class_names": config.get("label_names") or None,
            "mean": data.get("mean"),
            "std": data.get("std"),
        }
    )
