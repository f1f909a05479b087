"""From a backbone's description to the network. Called by assemble.py, and by whatever loads weights."""

from __future__ import annotations

from typing import Literal, cast

from pretrain.errors import ConfigError
from pretrain.models.spec import BackboneSpec
from pretrain.models.vit import VisionTransformer

BACKBONES = {"vit": VisionTransformer}


def build_backbone(
    spec: BackboneSpec, *, drop_path_rate: float = 0.0, weight_init: Literal["timm", "mae"] = "timm"
) -> VisionTransformer:
    """The backbone that `spec` describes, with fresh float32 weights from torch's global generator.

    Raises ConfigError for a kind of backbone that is not known, and for what the backbone refuses.
    """
    if spec.name not in BACKBONES:
        raise ConfigError(f"model.name: got {spec.name!r}; take one of {', '.join(BACKBONES)}")
    return BACKBONES[spec.name](
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        pooling=cast(Literal["cls", "avg"], spec.pooling),
        position_embedding=cast(Literal["learned", "sincos"], spec.position_embedding),
        drop_path_rate=drop_path_rate,
        weight_init=weight_init,
    )
