"""Read off tensors what backbone they are, where no config says so, or one says too little. Called by incoming.py.

A file of tensors alone does not say how many heads a ViT has, for which images a Swin or PVT was trained, in which
windows a Swin V2, or how images were normalised: what is not known is named. timm's own folders name an architecture,
which tells heads and windows.
"""

# D width

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.formats.timm import ARCHITECTURES, POOLING
from pretrain.models.sizes import PVT_SIZES, stage_windows
from pretrain.models.spec import BackboneSpec

HALF = (0.5, 0.5, 0.5)
WINDOWS = ("window_size", "pretrained_window_sizes")
TABLE = "attn.relative_position_bias_table"
SCALE = "attn.logit_scale"
FAMILIES = {  # how names of timm's begin
    "vit": ("vit_", "deit_"),
    "swin": ("swin_",),
    "swin_v2": ("swinv2_",),
    "pvt": ("pvt_v2_",),
}
# That no tensor's shape would tell.
OTHER_FUNCTIONS = ("quickgelu", "relpos", "rope", "parallel", "linear", "swinv2_cr")


def spec_of_tensors(tensors: Mapping[str, Tensor], *, where: str) -> tuple[BackboneSpec, tuple[str, ...]]:
    """What backbone `tensors` are, in timm's names, or a ViT's in transformers', and which fields are guesses.

    Raises CheckpointError when they are none.
    """
    try:
        if any(name.endswith(TABLE) for name in tensors):
            return _swin(tensors), ("image_size", "mean", "std")
        if any(name.endswith(SCALE) for name in tensors):
            return _swin_v2(tensors), ("image_size", *WINDOWS, "mean", "std")
        if any(name.startswith("stages.") for name in tensors):
            return _pvt(tensors)
        return _vit(tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise CheckpointError(
            f"{where}: holds no vision transformer in timm's or transformers' names "
            "(patch_embed.proj.weight, pos_embed, blocks.0.mlp.fc1.weight …)"
        ) from None


def notes_of_guesses(assumed: Sequence[str]) -> tuple[str, ...]:
    """What to say of a backbone of which fields were assumed, and that no tensor's shape could tell."""
    if "window_size" not in assumed:
        return ()
    return (
        "its tensors do not say in which windows they were trained: where the model has others, "
        "model.pretrained_window_sizes must name them",
    )


def _vit(tensors: Mapping[str, Tensor]) -> tuple[BackboneSpec, tuple[str, ...]]:
    names = r"(?:vit\.)?(?:blocks|encoder\.layer|layers)\.(\d+)\..*(?:fc1|intermediate\.dense)\.weight"
    widths = {
        int(m[1]): value.shape[0] for name, value in tensors.items() if (m := re.fullmatch(names, name))
    }
    patch = _first(tensors, "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    positions = _first(tensors, "pos_embed", "embeddings.position_embeddings")
    _, _, _, patch_size = patch.shape
    _, num_positions, D = positions.shape
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    hidden = widths[max(widths)]
    down = tensors.get("blocks.0.mlp.fc2.weight")
    swiglu = down is not None and hidden == 2 * down.shape[1]
    query_norm = tensors.get("blocks.0.attn.q_norm.weight")
    scale = tensors.get("blocks.0.ls1.gamma")
    pooling = "avg" if "fc_norm.weight" in tensors else "cls"
    spec = BackboneSpec(
        image_size=patch_size * max(math.isqrt(num_positions - (registers == 0)), 1),
        patch_size=patch_size,
        embed_dim=D,
        depth=max(widths) + 1,
        num_heads=1 if query_norm is None else D // query_norm.shape[0],
        mlp_ratio=hidden * 3 / 4 / D if swiglu else hidden / D,
        mlp="swiglu" if swiglu else "gelu",
        pooling="map" if "attn_pool.latent" in tensors else pooling,
        num_registers=registers,
        layer_scale_init=None if scale is None else 1e-5,  # which one it began from is of no account any more
        qk_norm=query_norm is not None,
        mean=HALF,
        std=HALF,
    )
    return spec, ("mean", "std") if query_norm is not None else ("num_heads", "mean", "std")


def _first(tensors: Mapping[str, Tensor], timm_name: str, other_name: str) -> Tensor:
    """Raises KeyError when there is none of that name."""
    for name in (timm_name, other_name):
        if name in tensors:
            return tensors[name]
    return tensors[f"vit.{other_name}"]


def _swin(tensors: Mapping[str, Tensor]) -> BackboneSpec:
    tables = [tensors[f"layers.{i}.blocks.0.{TABLE}"] for i in range(len(_depths(tensors, "layers")))]
    windows = [(math.isqrt(table.shape[0]) + 1) // 2 for table in tables]
    heads = tuple(table.shape[1] for table in tables)
    # the smallest images of which no stage is smaller than its window
    return _swin_of(tensors, name="swin", heads=heads, window_size=windows[0], smallest_window=min(windows))


def _swin_v2(tensors: Mapping[str, Tensor]) -> BackboneSpec:
    scales = [tensors[f"layers.{i}.blocks.0.{SCALE}"] for i in range(len(_depths(tensors, "layers")))]
    heads = tuple(scale.shape[0] for scale in scales)
    return _swin_of(tensors, name="swin_v2", heads=heads, window_size=8, smallest_window=8)


def _swin_of(
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    heads: tuple[int, ...],
    window_size: int,
    smallest_window: int,
) -> BackboneSpec:
    depths = _depths(tensors, "layers")
    widths = tuple(tensors[f"layers.{i}.blocks.0.norm1.weight"].shape[0] for i in range(len(depths)))
    patch_size = tensors["patch_embed.proj.weight"].shape[-1]
    hidden = tensors["layers.0.blocks.0.mlp.fc1.weight"].shape[0]
    return BackboneSpec(
        name=name,
        image_size=patch_size * smallest_window << (len(depths) - 1),
        patch_size=patch_size,
        embed_dim=widths[-1],
        depth=sum(depths),
        num_heads=heads[-1],
        mlp_ratio=hidden / widths[0],
        pooling="avg",
        window_size=window_size,
        embed_dims=widths,
        depths=depths,
        stage_heads=heads,
        mlp_ratios=(hidden / widths[0],) * len(depths),
        mean=HALF,
        std=HALF,
    )


def _pvt(tensors: Mapping[str, Tensor]) -> tuple[BackboneSpec, tuple[str, ...]]:
    depths = _depths(tensors, "stages")
    first = [f"stages.{i}.blocks.0." for i in range(len(depths))]
    widths = tuple(tensors[f"{block}norm1.weight"].shape[0] for block in first)
    ratios = tuple(
        tensors[f"{block}mlp.fc1.weight"].shape[0] / width for block, width in zip(first, widths, strict=True)
    )
    shrunk = [tensors.get(f"{block}attn.sr.weight") for block in first]
    named = [size for size in PVT_SIZES.values() if (size.embed_dims, size.depths) == (widths, depths)]
    heads = named[0].num_heads if named else (1,) * len(depths)
    spec = BackboneSpec(
        name="pvt",
        image_size=224,
        patch_size=4,
        embed_dim=widths[-1],
        depth=sum(depths),
        num_heads=heads[-1],
        mlp_ratio=ratios[-1],
        pooling="avg",
        embed_dims=widths,
        depths=depths,
        stage_heads=heads,
        mlp_ratios=ratios,
        sr_ratios=tuple(1 if weight is None else weight.shape[-1] for weight in shrunk),
        mean=HALF,
        std=HALF,
    )
    assumed = ("image_size", "mean", "std")
    return spec, assumed if named else ("num_heads", *assumed)


def _depths(tensors: Mapping[str, Tensor], stages: str) -> tuple[int, ...]:
    found = [re.match(rf"{stages}\.(\d+)\.blocks\.(\d+)\.", name) for name in tensors]
    pairs = {(int(m[1]), int(m[2])) for m in found if m}
    return tuple(
        1 + max(block for stage, block in pairs if stage == i) for i in range(1 + max(s for s, _ in pairs))
    )


def spec_of_timms_own(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str
) -> tuple[BackboneSpec, tuple[str, ...]]:
    """What a folder of timm's own is, whose config names an architecture and none of its arguments.

    Raises CheckpointError for one that is, or may be, no backbone of ours.
    """
    architecture = str(config["architecture"]).partition(".")[0]
    kind = next((kind for kind, starts in FAMILIES.items() if architecture.startswith(starts)), None)
    if kind is None or any(word in architecture for word in OTHER_FUNCTIONS):
        raise CheckpointError(
            f"{where}: architecture {architecture} is no backbone of ours, and model_args in config.json lacks what "
            "would describe it"
        )
    spec, assumed = spec_of_tensors(tensors, where=where)
    data = config.get("pretrained_cfg") or {}
    known: dict[str, Any] = {
        name: tuple(map(float, data[name])) for name in ("mean", "std") if data.get(name) is not None
    }
    if spec.name != kind:
        raise CheckpointError(
            f"{where}: holds the tensors of a {spec.name}, its config.json says {architecture}"
        )
    if data.get("input_size") and spec.name != "vit":  # a ViT's positions say it
        known["image_size"] = data["input_size"][-1]
    if spec.name == "swin_v2":
        known |= _windows_of_name(architecture, len(spec.staged_size.depths), spec.patch_size)
    if spec.name == "vit":
        widths = (spec.embed_dim, spec.depth, spec.mlp_dim)
        size = next((size for size in ARCHITECTURES if (size[0], size[1], size[3]) == widths), None)
        named = {name: size for size, name in ARCHITECTURES.items()}.get(architecture)
        if named is not None and (named[0], named[1], named[3]) != widths:
            raise CheckpointError(
                f"{where}: config.json says {architecture}, the tensors are of a {spec}, and model_args lacks what "
                "would describe that"
            )
        if size is not None and "num_heads" in assumed:
            known["num_heads"] = size[2]
        pooling = {name: ours for ours, name in POOLING.items()}.get(config.get("global_pool") or "token")
        if pooling is not None and pooling != "map":
            known["pooling"] = pooling if "fc_norm.weight" in tensors else "cls"
    return replace(spec, **known), tuple(name for name in assumed if name not in known)


def _windows_of_name(architecture: str, stages: int, patch_size: int) -> dict[str, Any]:
    """The windows that a name of timm's tells, such as swinv2_base_window12to16_192to256: trained in windows of 12 on
    images of 192 pixels, and then in windows of 16. Nothing of another name.
    """
    found = re.search(r"_window(\d+)(?:to(\d+))?_(\d+)", architecture)
    if found is None:
        return {}
    first, then, image_size = int(found[1]), found[2], int(found[3])
    if then is None:
        return {"window_size": first, "pretrained_window_sizes": None}
    trained_with = stage_windows(image_size // patch_size, first, stages)
    return {"window_size": int(then), "pretrained_window_sizes": trained_with}
