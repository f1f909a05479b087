"""Write and read timm's folders: `timm.create_model("local-dir:OUT", pretrained=True)`.

Our own parameter names are timm's, so the work is in config.json: every argument of the model is
written out, so that sizes which timm has no name for load too, and the images' mean and std are
given, because timm's default for a ViT is Inception's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import CheckpointError, ConfigError, UsageError
from pretrain.formats.files import write_json, write_tensors
from pretrain.formats.limits import why_not
from pretrain.models.sizes import SWINS, mlp_width, swiglu_width
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
ANY_SWIGLU = "vit_giant_patch14_dinov2"  # JSON cannot say which MLP; this entry point's is SwiGLUPacked
ANY_STAGED = {
    "swin": "swin_tiny_patch4_window7_224",
    "swin_v2": "swinv2_tiny_window8_256",
    "pvt": "pvt_v2_b0",
}
STAGED = {"swin": "swin_", "swin_v2": "swinv2_", "pvt": "pvt_v2_"}  # how names of timm's begin
NEEDED = {
    "vit": ("img_size", "patch_size", "embed_dim", "depth", "num_heads"),
    **dict.fromkeys(SWINS, ("img_size", "embed_dim", "depths", "num_heads", "window_size")),
    "pvt": ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios"),
}
POOLING = {"cls": "token", "avg": "avg", "map": "map"}


def timm_config(spec: BackboneSpec, *, head: bool, crop_fraction: float) -> dict[str, Any]:
    """The contents of config.json. crop_fraction is the part of the resized side that is kept."""
    num_classes = (spec.num_classes or 0) if head else 0
    config: dict[str, Any] = {
        "architecture": _architecture(spec),
        "num_classes": num_classes,
        "num_features": spec.embed_dim,
        "global_pool": POOLING[spec.pooling],
    }
    if head and spec.class_names is not None:
        config["label_names"] = list(spec.class_names)
    config["model_args"] = _vit_arguments(spec) if spec.name == "vit" else _staged_arguments(spec)
    config["pretrained_cfg"] = {
        "tag": "vit-pretrain",
        "custom_load": False,
        "input_size": [3, spec.image_size, spec.image_size],
        "fixed_input_size": spec.name != "pvt",
        "interpolation": "bicubic",
        "crop_pct": crop_fraction,
        "crop_mode": "center",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": HEADS.get(spec.name, "head"),
    }
    return config


HEADS = dict.fromkeys(SWINS, "head.fc")  # where it is not plain "head"


def _architecture(spec: BackboneSpec) -> str:
    if spec.name != "vit":
        return ANY_STAGED[spec.name]
    if spec.mlp == "swiglu":
        return ANY_SWIGLU
    size = (spec.embed_dim, spec.depth, spec.num_heads, spec.mlp_dim, spec.patch_size)
    return ARCHITECTURES.get(size, ANY_SIZE)


def _vit_arguments(spec: BackboneSpec) -> dict[str, Any]:
    hidden = 2 * swiglu_width(spec.mlp_dim) if spec.mlp == "swiglu" else spec.mlp_dim
    arguments: dict[str, Any] = {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "embed_dim": spec.embed_dim,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        "mlp_ratio": _ratio_for(spec.embed_dim, hidden),
        "class_token": True,
        "global_pool": POOLING[spec.pooling],
    }
    if spec.num_registers:
        arguments |= {"reg_tokens": spec.num_registers, "no_embed_class": True}
    if spec.layer_scale_init is not None or spec.mlp == "swiglu":  # that entry point has one by itself
        arguments["init_values"] = spec.layer_scale_init
    if spec.qk_norm:
        arguments["qk_norm"] = True
    return arguments


def _staged_arguments(spec: BackboneSpec) -> dict[str, Any]:
    size = spec.staged_size
    arguments: dict[str, Any] = {"depths": list(size.depths), "num_heads": list(size.num_heads)}
    if spec.name == "swin_v2":
        arguments["pretrained_window_sizes"] = list(spec.pretrained_window_sizes or (0,) * len(size.depths))
    if spec.name in SWINS:
        return arguments | {
            "img_size": spec.image_size,
            "patch_size": spec.patch_size,
            "embed_dim": size.embed_dims[0],
            "window_size": spec.window_size,
            "mlp_ratio": _ratio_for(size.embed_dims[0], mlp_width(size.embed_dims[0], size.mlp_ratios[0])),
        }
    ratios = [
        _ratio_for(width, mlp_width(width, ratio))
        for width, ratio in zip(size.embed_dims, size.mlp_ratios, strict=True)
    ]
    return arguments | {
        "embed_dims": list(size.embed_dims),
        "mlp_ratios": ratios,
        "sr_ratios": list(size.sr_ratios),
    }


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
    UsageError for a model that timm does not have.
    """
    if reason := why_not("timm", spec, head=bool(head)):
        raise UsageError(f"--format timm: {reason}")
    tensors = dict(weights)
    for name, value in (head or {}).items():
        tensors[f"{HEADS.get(spec.name, 'head')}.{name}"] = value
    write_tensors(out_dir / "model.safetensors", tensors)
    write_json(out_dir / "config.json", timm_config(spec, head=bool(head), crop_fraction=crop_fraction))


def is_timm(config: Mapping[str, Any]) -> bool:
    return "architecture" in config and "model_type" not in config


def is_written_out(config: Mapping[str, Any]) -> bool:
    """Does model_args describe the model, as our exports' does? timm's own name at most what was asked for."""
    arguments = config.get("model_args") or {}
    return all(name in arguments for name in NEEDED[_kind(config)])


def _kind(config: Mapping[str, Any]) -> str:
    architecture = str(config["architecture"])
    return next((kind for kind, start in STAGED.items() if architecture.startswith(start)), "vit")


def from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names of a timm folder's tensors: its own, but for the head's."""
    return {name.replace("head.fc.", "head.", 1): value for name, value in tensors.items()}


def read_timm_config(config: Mapping[str, Any], *, where: str) -> BackboneSpec:
    """The spec of a timm folder that writes its arguments out, as ours do; else CheckpointError."""
    arguments = config.get("model_args") or {}
    data = config.get("pretrained_cfg") or {}
    kind = _kind(config)
    if missing := [name for name in NEEDED[kind] if name not in arguments]:
        raise CheckpointError(
            f"{where}: model_args in config.json lacks {', '.join(missing)}; only folders whose "
            "arguments are written out, as `pretrain export` does, can be read"
        )
    common = {
        "num_classes": config.get("num_classes") or None,
        "class_names": config.get("label_names") or None,
        "mean": data.get("mean"),
        "std": data.get("std"),
    }
    if kind != "vit":
        # a PVT is built for any size
        image_size = arguments.get("img_size", (data.get("input_size") or [None])[-1])
        model = {"patch_size": 4, **arguments, "name": kind, "image_size": image_size}
        model["stage_heads"] = arguments["num_heads"]
        try:
            spec = BackboneSpec.of_recipe(model, common)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None
        return replace(spec, num_classes=common["num_classes"], class_names=_names(common["class_names"]))
    return BackboneSpec.from_dict({**_read_vit(config, arguments, where=where), **common})


def _names(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def _read_vit(config: Mapping[str, Any], arguments: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    pooling = {name: ours for ours, name in POOLING.items()}.get(arguments.get("global_pool", "token"))
    registers = arguments.get("reg_tokens", 0)
    if pooling is None or not arguments.get("class_token", True):
        raise CheckpointError(
            f"{where}: pooling {arguments.get('global_pool')!r} with class_token="
            f"{arguments.get('class_token', True)} is no backbone of ours; token, avg or map with a class token is"
        )
    if bool(arguments.get("no_embed_class", False)) != bool(registers):
        raise CheckpointError(
            f"{where}: no_embed_class={arguments.get('no_embed_class', False)} with reg_tokens={registers} is no "
            "backbone of ours, in which registers go with positions of the patches alone"
        )
    embed_dim = arguments["embed_dim"]
    hidden = int(embed_dim * arguments.get("mlp_ratio", 4.0))  # timm cuts off
    swiglu = config["architecture"] == ANY_SWIGLU
    return {
        "image_size": arguments["img_size"],
        "patch_size": arguments["patch_size"],
        "embed_dim": embed_dim,
        "depth": arguments["depth"],
        "num_heads": arguments["num_heads"],
        # of a SwiGLU the MLP it stands for: as wide as gives its width again
        "mlp_ratio": hidden * 3 / 4 / embed_dim if swiglu else hidden / embed_dim,
        "mlp": "swiglu" if swiglu else "gelu",
        "pooling": pooling,
        "num_registers": registers,
        "layer_scale_init": arguments.get("init_values"),
        "qk_norm": arguments.get("qk_norm", False),
    }
