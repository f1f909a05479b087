"""Names and config of transformers' `PvtV2Model` and `PvtV2ForImageClassification`. Called by hugging_face.py.

All norms there add one epsilon to the variance, 1e-6; those behind a convolution add 1e-5 here, as the authors' and
timm's do. A norm of c · x with c² times the epsilon is the norm of x: so these convolutions are written scaled by
c = √0.1, and scaled back when they are read. Features are the same. As scaling rounds, an export keeps the convolutions
as they were in a file of their own, UNSCALED; they are taken from it where they still give what stands in the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.formats.naming import with_start_renamed
from pretrain.models.spec import BackboneSpec

LAYER_NORM_EPS = 1e-6  # transformers' default, and ours in blocks and behind stages
CONVOLUTION_NORM_EPS = 1e-5  # ours, of models/pvt.py
UNSCALED = "unscaled.safetensors"  # not of transformers, which does not look at it
SCALE = math.sqrt(LAYER_NORM_EPS / CONVOLUTION_NORM_EPS)
NOTE = (
    "convolutions before a norm are scaled by √10, as transformers' norms add 1e-6 to the variance there and ours "
    "1e-5; the features are the same"
)

BLOCK = {  # within a block; keys and values are one layer here
    "norm1.": "layer_norm_1.",
    "attn.q.": "attention.query.",
    "attn.proj.": "attention.proj.",
    "attn.sr.": "attention.spatial_reduction.",
    "attn.norm.": "attention.layer_norm.",
    "norm2.": "layer_norm_2.",
    "mlp.fc1.": "mlp.dense1.",
    "mlp.dwconv.": "mlp.dwconv.dwconv.",
    "mlp.fc2.": "mlp.dense2.",
}
EMBED = {"proj.": "proj.", "norm.": "layer_norm."}  # within the patches of a stage
_OUR_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)")
_OUR_EMBED = re.compile(r"(?:patch_embed|stages\.(\d+)\.downsample)\.(.+)")
_OUR_NORM = re.compile(r"stages\.(\d+)\.norm\.(.+)")
_THEIR_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.(.+)")
_THEIR_EMBED = re.compile(r"encoder\.layers\.(\d+)\.patch_embedding\.(.+)")
_THEIR_NORM = re.compile(r"encoder\.layers\.(\d+)\.layer_norm\.(.+)")
_SCALED = re.compile(r"(patch_embed\.proj|downsample\.proj|attn\.sr)\.(weight|bias)$")


def unscaled(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a PVT v2's tensors, in timm's names, that are written scaled: the contents of UNSCALED."""
    return {name: value for name, value in weights.items() if _SCALED.search(name)}


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A PVT v2's tensors in timm's names -> those of a bare PvtV2Model."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if _SCALED.search(name):
            value = value * SCALE
        if found := _OUR_BLOCK.fullmatch(name):
            place = f"encoder.layers.{found[1]}.blocks.{found[2]}."
            if found[3].startswith("attn.kv."):
                kind = found[3].removeprefix("attn.kv.")
                for part, half in zip(("key", "value"), value.chunk(2), strict=True):
                    renamed[f"{place}attention.{part}.{kind}"] = half
            else:
                renamed[place + with_start_renamed(found[3], BLOCK)] = value
        elif found := _OUR_EMBED.fullmatch(name):
            renamed[
                f"encoder.layers.{found[1] or 0}.patch_embedding.{with_start_renamed(found[2], EMBED)}"
            ] = value
        elif found := _OUR_NORM.fullmatch(name):
            renamed[f"encoder.layers.{found[1]}.layer_norm.{found[2]}"] = value
        else:
            raise AssertionError(f"no PVT has {name}")
    return renamed


def from_hugging_face(
    tensors: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The way back: transformers' names -> timm's. What is not a PVT's keeps its name.

    before: the contents of UNSCALED; those that the tensors no longer follow from are not taken.
    """
    before = before or {}
    plain = {name.removeprefix("pvt_v2."): value for name, value in tensors.items()}
    block, embed = ({theirs: ours for ours, theirs in names.items()} for names in (BLOCK, EMBED))
    found: dict[str, Tensor] = {}
    for name, value in plain.items():
        ours = name
        if match := _THEIR_BLOCK.fullmatch(name):
            place = f"stages.{match[1]}.blocks.{match[2]}."
            if half := re.fullmatch(r"attention\.(key|value)\.(\w+)", match[3]):
                start = f"encoder.layers.{match[1]}.blocks.{match[2]}.attention."
                parts = [plain.get(f"{start}{part}.{half[2]}") for part in ("key", "value")]
                together = [part for part in parts if part is not None]
                if len(together) == len(parts):
                    found[f"{place}attn.kv.{half[2]}"] = torch.cat(together)
                    continue
            else:
                ours = place + with_start_renamed(match[3], block)
        elif match := _THEIR_EMBED.fullmatch(name):
            stage = "patch_embed" if match[1] == "0" else f"stages.{match[1]}.downsample"
            ours = f"{stage}.{with_start_renamed(match[2], embed)}"
        elif match := _THEIR_NORM.fullmatch(name):
            ours = f"stages.{match[1]}.norm.{match[2]}"
        elif match := re.fullmatch(r"classifier\.(weight|bias)", name):
            ours = f"head.{match[1]}"
        if not _SCALED.search(ours):
            found[ours] = value
        elif ours in before and torch.equal(before[ours] * SCALE, value):
            found[ours] = before[ours]
        else:
            found[ours] = value / SCALE
    return found


def pvt_config(spec: BackboneSpec, *, head: bool) -> dict[str, Any]:
    """What config.json says of the model, but for its labels. The MLPs' ratios are whole: limits.py saw to it."""
    size = spec.staged_size
    stages = len(size.depths)
    return {
        "architectures": ["PvtV2ForImageClassification" if head else "PvtV2Model"],
        "model_type": "pvt_v2",
        "image_size": spec.image_size,
        "num_channels": 3,
        "num_encoder_blocks": stages,
        "depths": list(size.depths),
        "sr_ratios": list(size.sr_ratios),
        "hidden_sizes": list(size.embed_dims),
        "patch_sizes": _patch_sizes(stages),
        "strides": _strides(stages),
        "num_attention_heads": list(size.num_heads),
        "mlp_ratios": [int(ratio) for ratio in size.mlp_ratios],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "drop_path_rate": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
        "linear_attention": False,
    }


def read_pvt_config(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The recipe's section `model` of such a config; CheckpointError where it is not such a PVT."""
    needed = ("image_size", "hidden_sizes", "depths", "num_attention_heads", "mlp_ratios", "sr_ratios")
    if missing := [name for name in needed if name not in config]:
        raise CheckpointError(f"{where}: config.json lacks {', '.join(missing)}")
    stages, image_size = len(config["depths"]), config["image_size"]
    # transformers writes both sides of an image
    sides = set(image_size) if isinstance(image_size, list | tuple) else {image_size}
    right = {
        "image_size": len(sides) == 1,
        "layer_norm_eps": config.get("layer_norm_eps", LAYER_NORM_EPS) == LAYER_NORM_EPS,
        "hidden_act": config.get("hidden_act", "gelu") == "gelu",
        "qkv_bias": config.get("qkv_bias", True) is True,
        "linear_attention": config.get("linear_attention", False) is False,
        "num_channels": config.get("num_channels", 3) == 3,
        "patch_sizes": list(config.get("patch_sizes", _patch_sizes(stages))) == _patch_sizes(stages),
        "strides": list(config.get("strides", _strides(stages))) == _strides(stages),
    }
    if bad := [f"{name}={config.get(name)!r}" for name, is_right in right.items() if not is_right]:
        raise CheckpointError(f"{where}: config.json describes another model than ours: {', '.join(bad)}")
    return {
        "name": "pvt",
        "image_size": sides.pop(),
        "patch_size": 4,
        "embed_dims": config["hidden_sizes"],
        "depths": config["depths"],
        "stage_heads": config["num_attention_heads"],
        "mlp_ratios": config["mlp_ratios"],
        "sr_ratios": config["sr_ratios"],
    }


def _patch_sizes(stages: int) -> list[int]:
    return [7] + [3] * (stages - 1)


def _strides(stages: int) -> list[int]:
    return [4] + [2] * (stages - 1)
