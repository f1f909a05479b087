"""What a format cannot hold, from a backbone's description. Called before an export, and by dry runs; no torch."""

from __future__ import annotations

import math

from pretrain.models.sizes import SWINS
from pretrain.models.spec import BackboneSpec


def why_not(format: str, spec: BackboneSpec, *, head: bool) -> str | None:
    """Why the format ("timm", "hf", "safetensors") cannot hold that backbone, with a class head or without; None if it
    can. The last holds all."""
    if format == "safetensors":
        return None
    return _why_not_timm(spec) if format == "timm" else _why_not_hugging_face(spec, head=head)


def _why_not_timm(spec: BackboneSpec) -> str | None:
    if spec.position_embedding == "rope":
        return "the export of rotary positions is not written yet"
    if spec.mlp == "swiglu" and spec.pooling == "map":
        return "timm gives the MLP of attention pooling the blocks' activation, and ours has a GELU beside a SwiGLU"
    if spec.name in SWINS:
        assert spec.window_size is not None, "the spec was checked"
        for stage, depth in enumerate(spec.staged_size.depths):
            side = math.ceil(spec.grid / 2**stage)
            if depth > 1 and side > spec.window_size and side % spec.window_size:
                return (
                    f"timm shifts windows before it pads them, and stage {stage + 1} has {side} tokens a side in "
                    f"windows of {spec.window_size}; take an image_size that is a multiple of "
                    f"{spec.patch_size * spec.window_size * 2 ** (len(spec.staged_size.depths) - 1)}"
                )
    return None


def _why_not_hugging_face(spec: BackboneSpec, *, head: bool) -> str | None:
    if spec.name == "pvt":
        if any(ratio != int(ratio) for ratio in spec.staged_size.mlp_ratios):
            return "transformers' PVT v2 takes whole numbers as mlp_ratios"
        return None
    if spec.name == "swin":
        assert spec.window_size is not None, "the spec was checked"
        smallest = math.ceil(spec.grid / 2 ** (len(spec.staged_size.depths) - 1))
        if smallest < spec.window_size:
            return (
                f"transformers gives every stage a table for windows of {spec.window_size}, and the last has "
                f"{smallest} tokens a side; take a smaller model.window_size or larger images"
            )
        return None
    if spec.name == "swin_v2":
        return _why_not_swinv2(spec)
    asked = {
        "registers": spec.num_registers > 0,
        "LayerScale": spec.layer_scale_init is not None,
        "QK-norm": spec.qk_norm,
        "SwiGLU": spec.mlp == "swiglu",
        "rotary positions": spec.position_embedding == "rope",
        "attention pooling": spec.pooling == "map",
    }
    if found := [name for name, is_there in asked.items() if is_there]:
        return f"transformers' ViT has no {', '.join(found)}"
    if head and spec.pooling == "avg":
        return (
            "the class head stands on average pooling, and ViTForImageClassification only reads the class token; "
            "export with --no-head, or with --format timm"
        )
    return None


def _why_not_swinv2(spec: BackboneSpec) -> str | None:
    """transformers rounds the sides of small stages down where it chooses their windows; maps are rounded up."""
    assert spec.window_size is not None, "the spec was checked"
    if 1 in (spec.pretrained_window_sizes or ()):
        return "transformers divides by pretrained_window_sizes less 1, and one of them is 1"
    for stage in range(len(spec.staged_size.depths)):
        side = spec.grid / 2**stage
        if side != int(side) and int(side) <= spec.window_size:
            return (
                f"transformers takes the {math.ceil(side)} tokens a side of stage {stage + 1} for {int(side)}; take an "
                f"image_size that is a multiple of {spec.stride}"
            )
    return None
