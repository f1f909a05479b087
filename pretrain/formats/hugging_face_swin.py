"""Names and config of transformers' `SwinModel` and `SwinForImageClassification`, and of their Swin V2. Called by
hugging_face.py.

On disk the names are those of transformers before 5, as for a ViT. Merging stands at the end of a stage there, and at
the start of the next here. A Swin V2's query, key and value are one product here, with two biases beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.formats.naming import with_start_renamed
from pretrain.models.spec import BackboneSpec

LAYER_NORM_EPS = 1e-5  # transformers' default for Swin, and ours
ATTENTION = "attention.self."  # on disk
TABLE = "relative_position_bias_table"
PREFIX = {"swin": "swin", "swin_v2": "swinv2"}  # also the model_type
BARE = {"swin": "SwinModel", "swin_v2": "Swinv2Model"}
WITH_HEAD = {"swin": "SwinForImageClassification", "swin_v2": "Swinv2ForImageClassification"}
FOLLOW = ("relative_position_index", "relative_coords_table")  # from the window
TOP = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "patch_embed.norm.": "embeddings.norm.",
    "norm.": "layernorm.",
}
LAYER = {
    "norm1.": "layernorm_before.",
    f"attn.{TABLE}": f"{ATTENTION}{TABLE}",
    "attn.logit_scale": f"{ATTENTION}logit_scale",
    "attn.cpb_mlp.": f"{ATTENTION}continuous_position_bias_mlp.",
    "attn.q_bias": f"{ATTENTION}query.bias",
    "attn.v_bias": f"{ATTENTION}value.bias",
    "attn.proj.": "attention.output.dense.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
OF_ATTENTION = re.compile(
    rf"(encoder\.(layers\.\d+\.blocks\.\d+\.){ATTENTION})(query|key|value)\.(weight|bias)"
)
# The names inside transformers 5, which some of its own folders carry.
NEW_NAMES = (
    (r"\.attention\.(q|k|v)_proj\.", rf".{ATTENTION}\1."),
    (rf"\.{re.escape(ATTENTION)}q\.", f".{ATTENTION}query."),
    (rf"\.{re.escape(ATTENTION)}k\.", f".{ATTENTION}key."),
    (rf"\.{re.escape(ATTENTION)}v\.", f".{ATTENTION}value."),
    (rf"\.attention\.relative_position_bias\.{TABLE}", f".{ATTENTION}{TABLE}"),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Swin's tensors in timm's names -> those of a bare SwinModel or Swinv2Model."""
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        if found := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
            renamed[f"encoder.layers.{int(found[1]) - 1}.downsample.{found[2]}"] = value
        elif found := re.fullmatch(r"(layers\.\d+\.blocks\.\d+\.)attn\.qkv\.(weight|bias)", name):
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"encoder.{found[1]}{ATTENTION}{part}.{found[2]}"] = third
        elif found := re.fullmatch(r"(layers\.\d+\.blocks\.\d+\.)(.+)", name):
            renamed[f"encoder.{found[1]}{with_start_renamed(found[2], LAYER)}"] = value
        else:
            renamed[with_start_renamed(name, TOP)] = value
    return renamed


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: transformers' names, old or new -> timm's. What is not a Swin's keeps its name."""
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for prefix in PREFIX.values():
            name = name.removeprefix(f"{prefix}.")
        for pattern, replacement in NEW_NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.endswith(FOLLOW):
            plain[name] = value
    top, layer = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, LAYER))
    found: dict[str, Tensor] = {}
    for name, value in plain.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.downsample\.(.+)", name):
            found[f"layers.{int(match[1]) + 1}.downsample.{match[2]}"] = value
        elif (match := OF_ATTENTION.fullmatch(name)) and f"{match[1]}key.{match[4]}" in plain:
            if match[3] != "query":
                continue  # with the query
            parts = [plain.get(f"{match[1]}{part}.{match[4]}") for part in ("query", "key", "value")]
            if all(part is not None for part in parts):
                found[f"{match[2]}attn.qkv.{match[4]}"] = torch.cat(
                    [part for part in parts if part is not None]
                )
        elif match := re.fullmatch(r"encoder\.(layers\.\d+\.blocks\.\d+\.)(.+)", name):
            found[f"{match[1]}{with_start_renamed(match[2], layer)}"] = value
        elif match := re.fullmatch(r"classifier\.(weight|bias)", name):
            found[f"head.{match[1]}"] = value
        else:
            found[with_start_renamed(name, top)] = value
    return found


def swin_config(spec: BackboneSpec, *, head: bool) -> dict[str, Any]:
    """What config.json says of the model, but for its labels."""
    size = spec.staged_size
    windows: dict[str, Any] = {"window_size": spec.window_size}
    if spec.name == "swin_v2":
        windows["pretrained_window_sizes"] = list(spec.pretrained_window_sizes or (0,) * len(size.depths))
    return {
        "architectures": [WITH_HEAD[spec.name] if head else BARE[spec.name]],
        "model_type": PREFIX[spec.name],
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": 3,
        "embed_dim": size.embed_dims[0],
        "depths": list(size.depths),
        "num_heads": list(size.num_heads),
        **windows,
        "mlp_ratio": size.mlp_ratios[0],
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "initializer_range": 0.02,
        "layer_norm_eps": LAYER_NORM_EPS,
        "encoder_stride": spec.patch_size << (len(size.depths) - 1),
    }


def read_swin_config(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The recipe's section `model` of such a config; CheckpointError where it is not such a Swin."""
    right = {
        "layer_norm_eps": config.get("layer_norm_eps", LAYER_NORM_EPS) == LAYER_NORM_EPS,
        "hidden_act": config.get("hidden_act", "gelu") == "gelu",
        "qkv_bias": config.get("qkv_bias", True) is True,
        "use_absolute_embeddings": not config.get("use_absolute_embeddings", False),
        "num_channels": config.get("num_channels", 3) == 3,
    }
    if bad := [f"{name}={config.get(name)!r}" for name, is_right in right.items() if not is_right]:
        raise CheckpointError(f"{where}: config.json describes another model than ours: {', '.join(bad)}")
    needed = ("image_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio")
    if missing := [name for name in needed if name not in config]:
        raise CheckpointError(f"{where}: config.json lacks {', '.join(missing)}")
    model = {name: config[name] for name in needed if name != "num_heads"}
    if config["model_type"] == PREFIX["swin_v2"]:
        model["pretrained_window_sizes"] = config.get("pretrained_window_sizes")
    name = next(ours for ours, theirs in PREFIX.items() if theirs == config["model_type"])
    return {**model, "name": name, "stage_heads": config["num_heads"]}
