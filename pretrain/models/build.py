"""From a backbone's description to the network. Called by assemble.py, and by whatever loads weights."""

from __future__ import annotations

from typing import Literal, cast

from pretrain.models.backbone import Backbone
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.sizes import SWINS
from pretrain.models.spec import BackboneSpec
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import DropPathMode, MlpKind, Pooling, PositionEmbedding, VisionTransformer


def build_backbone(
    spec: BackboneSpec,
    *,
    drop_path_rate: float = 0.0,
    drop_path_mode: DropPathMode = "per_sample",
    weight_init: Literal["timm", "mae"] = "timm",
) -> Backbone:
    """The backbone that `spec` describes, with fresh float32 weights from torch's global generator.

    drop_path_mode and weight_init are a ViT's; the others have one of each. Raises ConfigError for what the
    backbone refuses.
    """
    if spec.name in SWINS:
        size = spec.staged_size
        assert spec.window_size is not None, "the spec was checked"
        return SwinTransformer(
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            embed_dim=size.embed_dims[0],
            depths=size.depths,
            num_heads=size.num_heads,
            window_size=spec.window_size,
            mlp_ratio=size.mlp_ratios[0],
            drop_path_rate=drop_path_rate,
            version=2 if spec.name == "swin_v2" else 1,
            pretrained_window_sizes=spec.pretrained_window_sizes,
        )
    if spec.name == "pvt":
        size = spec.staged_size
        return PyramidVisionTransformer(
            image_size=spec.image_size,
            embed_dims=size.embed_dims,
            depths=size.depths,
            num_heads=size.num_heads,
            mlp_ratios=size.mlp_ratios,
            sr_ratios=size.sr_ratios,
            drop_path_rate=drop_path_rate,
        )
    return VisionTransformer(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        embed_dim=spec.embed_dim,
        depth=spec.depth,
        num_heads=spec.num_heads,
        mlp_ratio=spec.mlp_ratio,
        pooling=cast(Pooling, spec.pooling),
        position_embedding=cast(PositionEmbedding, spec.position_embedding),
        rotary_grid=spec.rotary_grid,
        num_registers=spec.num_registers,
        layer_scale_init=spec.layer_scale_init,
        qk_norm=spec.qk_norm,
        mlp=cast(MlpKind, spec.mlp),
        drop_path_rate=drop_path_rate,
        drop_path_mode=drop_path_mode,
        weight_init=weight_init,
    )
