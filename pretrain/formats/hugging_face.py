"""Write and read transformers' folders of a ViT (`ViTModel`, `ViTForImageClassification`), both Swins and a PVT v2.

On disk the names are those of transformers before 5, which newer ones convert while loading, so
one folder serves both. A bare ViTModel gets a pooler that passes the class token through:
transformers builds one whether it is asked for or not, and would otherwise make up its weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointError, ConfigError, UsageError
from pretrain.formats import hugging_face_pvt, hugging_face_swin
from pretrain.formats.files import write_json, write_tensors
from pretrain.formats.limits import why_not
from pretrain.formats.naming import final_norm
from pretrain.models.sizes import SWINS
from pretrain.models.spec import BackboneSpec

LAYER_NORM_EPS = 1e-6  # timm's and ours; transformers' default is 1e-12
THEIR_EPS = 1e-12  # what Google's ViTs and MAE's have there
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
# Of the backbone's tensors beside a head.
PREFIX = {"vit": "vit", **hugging_face_swin.PREFIX, "pvt": "pvt_v2"}

# timm's name: transformers' name, for all but the fused attention weights
TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
}
LAYER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# The names inside transformers 5, which some of its own folders carry.
NEW_NAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.(q|k|v)_proj\.", r".attention.attention.\1."),
    (r"\.attention\.attention\.q\.", ".attention.attention.query."),
    (r"\.attention\.attention\.k\.", ".attention.attention.key."),
    (r"\.attention\.attention\.v\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def refuse_what_hugging_face_cannot_hold(spec: BackboneSpec, *, head: bool) -> None:
    """UsageError for a model that no class of transformers computes, or that is not written for it."""
    if reason := why_not("hf", spec, head=head):
        raise UsageError(f"--format hf: {reason}")


def to_hugging_face(weights: Mapping[str, Tensor], spec: BackboneSpec) -> dict[str, Tensor]:
    """A backbone's tensors in timm's names -> those of a bare ViTModel, without the pooler, or of a SwinModel,
    Swinv2Model or PvtV2Model.
    """
    if spec.name in SWINS:
        return hugging_face_swin.to_hugging_face(weights)
    if spec.name == "pvt":
        return hugging_face_pvt.to_hugging_face(weights)
    renamed = {theirs: weights[ours] for ours, theirs in TOP.items()}
    for i in range(spec.depth):
        for kind in ("weight", "bias"):
            for ours, theirs in LAYER.items():
                renamed[f"encoder.layer.{i}.{theirs}.{kind}"] = weights[f"blocks.{i}.{ours}.{kind}"]
            fused = weights[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for theirs, part in zip(("query", "key", "value"), fused, strict=True):
                renamed[f"encoder.layer.{i}.attention.attention.{theirs}.{kind}"] = part
    norm = final_norm(spec.pooling)
    return {
        **renamed,
        "layernorm.weight": weights[f"{norm}.weight"],
        "layernorm.bias": weights[f"{norm}.bias"],
    }


def from_hugging_face(
    tensors: Mapping[str, Tensor], spec: BackboneSpec, *, unscaled: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The way back: transformers' names, old or new -> timm's. What is not the backbone's keeps its name.

    unscaled: of a PVT, what an export keeps in hugging_face_pvt.UNSCALED.
    """
    if spec.name in SWINS:
        return hugging_face_swin.from_hugging_face(tensors)
    if spec.name == "pvt":
        return hugging_face_pvt.from_hugging_face(tensors, unscaled)
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        name = name.removeprefix("vit.")
        for pattern, replacement in NEW_NAMES:
            name = re.sub(pattern, replacement, name)
        plain[name] = value
    norm = final_norm(spec.pooling)
    renames = {theirs: ours for ours, theirs in TOP.items()}
    for kind in ("weight", "bias"):
        renames[f"layernorm.{kind}"] = f"{norm}.{kind}"
        renames[f"classifier.{kind}"] = f"head.{kind}"
        for i in range(spec.depth):
            for ours, theirs in LAYER.items():
                renames[f"encoder.layer.{i}.{theirs}.{kind}"] = f"blocks.{i}.{ours}.{kind}"
    found: dict[str, Tensor] = {}
    for i in range(spec.depth):
        for kind in ("weight", "bias"):
            names = [
                f"encoder.layer.{i}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")
            ]
            if all(name in plain for name in names):
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([plain.pop(name) for name in names])
    return {**found, **{renames.get(name, name): value for name, value in plain.items()}}


def hugging_face_config(spec: BackboneSpec, *, head: bool) -> dict[str, Any]:
    """The contents of config.json."""
    make_config = {**dict.fromkeys(SWINS, hugging_face_swin.swin_config), "pvt": hugging_face_pvt.pvt_config}
    config = make_config.get(spec.name, _vit_config)(spec, head=head)
    if head:
        names = spec.class_names or tuple(f"LABEL_{i}" for i in range(spec.num_classes or 0))
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    return config


def _vit_config(spec: BackboneSpec, *, head: bool) -> dict[str, Any]:
    return {
        "architectures": ["ViTForImageClassification" if head else "ViTModel"],
        "model_type": "vit",
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "encoder_stride": spec.patch_size,
        "pooler_output_size": spec.embed_dim,
        "pooler_act": "linear",
        # Not transformers' own key. "cls": last_hidden_state[:, 0]; "avg": the model's layernorm
        # applied to hidden_states[-1][:, 1:].mean(1), because the mean is taken before the norm.
        "feature_pooling": spec.pooling,
    }


def preprocessor_config(spec: BackboneSpec, *, crop_fraction: float) -> dict[str, Any]:
    """Resize the short side, cut the centre, scale to [0, 1], normalise: what evaluation does here.

    BitImageProcessor, because ViTImageProcessor of transformers 4 squeezes to a square instead.
    """
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(spec.image_size / crop_fraction)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": spec.image_size, "width": spec.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }


def write_hugging_face(
    out_dir: Path,
    weights: Mapping[str, Tensor],
    spec: BackboneSpec,
    *,
    head: Mapping[str, Tensor] | None = None,
    crop_fraction: float = 1.0,
) -> None:
    """Write model.safetensors, config.json and preprocessor_config.json into out_dir, which exists; of a PVT also
    hugging_face_pvt.UNSCALED.

    weights: the backbone's tensors, float32, in timm's names. head: {"weight": (K, D), "bias": (K,)}.
    UsageError for what transformers' ViT does not have, and for a head on average pooling.
    """
    refuse_what_hugging_face_cannot_hold(spec, head=bool(head))
    tensors = to_hugging_face(weights, spec)
    if head:
        tensors = {f"{PREFIX[spec.name]}.{name}": value for name, value in tensors.items()}
        tensors.update({f"classifier.{name}": value for name, value in head.items()})
    elif spec.name == "vit":
        tensors["pooler.dense.weight"] = torch.eye(spec.embed_dim)
        tensors["pooler.dense.bias"] = torch.zeros(spec.embed_dim)
    write_tensors(out_dir / "model.safetensors", tensors)
    if spec.name == "pvt":
        write_tensors(out_dir / hugging_face_pvt.UNSCALED, hugging_face_pvt.unscaled(weights))
    write_json(out_dir / "config.json", hugging_face_config(spec, head=bool(head)))
    write_json(out_dir / "preprocessor_config.json", preprocessor_config(spec, crop_fraction=crop_fraction))


def notes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a backbone that is read is not quite the same here."""
    if config.get("model_type") == "pvt_v2":
        return (hugging_face_pvt.NOTE,)
    eps = config.get("layer_norm_eps", THEIR_EPS)
    if config.get("model_type") in hugging_face_swin.PREFIX.values() or eps == LAYER_NORM_EPS:
        return ()
    return (
        f"its norms add {eps:g} to the variance, ours {LAYER_NORM_EPS:g}: features differ in the sixth digit",
    )


def is_hugging_face(config: Mapping[str, Any]) -> bool:
    return "model_type" in config


def read_hugging_face_config(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, *, where: str
) -> BackboneSpec:
    """The spec of a transformers ViT, Swin, Swin V2 or PVT v2 folder; CheckpointError where it is not such a one."""
    swins = dict.fromkeys(hugging_face_swin.PREFIX.values(), hugging_face_swin.read_swin_config)
    read_staged = {**swins, "pvt_v2": hugging_face_pvt.read_pvt_config}
    kind = config.get("model_type")
    if kind in read_staged:
        model = read_staged[kind](config, where=where)
        with_head = hugging_face_swin.WITH_HEAD.get(model["name"], "PvtV2ForImageClassification")
        common = _classes_and_pixels(config, preprocessor or {}, with_head)
        try:
            spec = BackboneSpec.of_recipe(model, common)
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from None
        return replace(spec, num_classes=common["num_classes"], class_names=common["class_names"])
    wrong = {
        "model_type": config.get("model_type") in ("vit", "vit_mae"),
        "layer_norm_eps": config.get("layer_norm_eps", THEIR_EPS) in (LAYER_NORM_EPS, THEIR_EPS),
        "hidden_act": config.get("hidden_act", "gelu") == "gelu",
        "qkv_bias": config.get("qkv_bias", True) is True,
        "num_channels": config.get("num_channels", 3) == 3,
    }
    if bad := [f"{name}={config.get(name)!r}" for name, right in wrong.items() if not right]:
        raise CheckpointError(f"{where}: config.json describes another model than ours: {', '.join(bad)}")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size")
    if missing := [name for name in (*needed, "patch_size") if name not in config]:
        raise CheckpointError(f"{where}: config.json lacks {', '.join(missing)}")
    return BackboneSpec.from_dict(
        {
            "image_size": config["image_size"],
            "patch_size": config["patch_size"],
            "embed_dim": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
            "pooling": config.get("feature_pooling", "cls"),
            **_classes_and_pixels(config, preprocessor or {}, "ViTForImageClassification"),
        }
    )


def _classes_and_pixels(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], with_head: str
) -> dict[str, Any]:
    labels = config.get("id2label") if with_head in (config.get("architectures") or []) else None
    names = tuple(labels[key] for key in sorted(labels, key=int)) if labels else None
    made_up = names is not None and names == tuple(f"LABEL_{i}" for i in range(len(names)))
    return {
        "num_classes": len(names) if names else None,
        "class_names": None if made_up else names,
        "mean": preprocessor.get("image_mean", (0.5, 0.5, 0.5)),  # ViTImageProcessor's defaults
        "std": preprocessor.get("image_std", (0.5, 0.5, 0.5)),
    }
