"""From plain values to a backbone. Called by commands and by whatever loads weights."""

from __future__ import annotations

from typing import Literal

from pretrain.errors import ConfigError
from pretrain.models.sizes import resolve_size
from pretrain.models.vit import VisionTransformer

BACKBONES = {"vit": VisionTransformer}


def build_vit(
    *,
    image_size: int,
    patch_size: int,
    name: str = "vit",
    size: str | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    pooling: Literal["cls", "avg"] = "cls",
    position_embedding: Literal["learned", "sincos"] = "learned",
    drop_path_rate: float = 0.0,
    weight_init: Literal["timm", "mae"] = "timm",
) -> VisionTransformer:
    """A vision transformer of a named size, or of free dimensions, with fresh float32 weights.

    Weights come from torch's global generator. Raises ConfigError for what resolve_size or the
    backbone refuses.
    """
    if name not in BACKBONES:
        raise ConfigError(f"model.name: got {name!r}; take one of {', '.join(BACKBONES)}")
    dimensions = resolve_size(
        size=size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio
    )
    return BACKBONES[name](
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=dimensions.embed_dim,
        depth=dimensions.depth,
        num_heads=dimensions.num_heads,
        mlp_ratio=dimensions.mlp_ratio,
        pooling=pooling,
        position_embedding=position_embedding,
        drop_path_rate=drop_path_rate,
        weight_init=weight_init,
    )
