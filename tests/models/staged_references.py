"""timm's and transformers' Swin, Swin V2 and PVT v2 with the weights of ours."""

from __future__ import annotations

from typing import Any

import torch
from timm_reference import import_timm, import_transformers

from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer


def timm_swin(
    ours: SwinTransformer, num_heads: tuple[int, ...], image_size: int | None = None, **changes: Any
) -> Any:
    """For images of another size than ours was built for, by timm's own set_input_size."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformer as First
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Second

    theirs = (First if ours.version == 1 else Second)(
        img_size=ours.image_size,
        patch_size=ours.patch_size,
        embed_dim=ours.embed_dims[0],
        depths=ours.depths,
        num_heads=num_heads,
        window_size=ours.window_size,
        num_classes=0,
        drop_path_rate=0.0,
        **changes,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if image_size is not None:
        theirs.set_input_size((image_size, image_size), window_size=ours.window_size)
    return theirs.eval()


@torch.no_grad()
def transformers_swin(ours: SwinTransformer, num_heads: tuple[int, ...], masked: bool = False) -> Any:
    """SwinModel, or SwinForMaskedImageModeling without its own decoder's weights."""
    transformers = import_transformers()
    config = transformers.SwinConfig(
        image_size=ours.image_size,
        patch_size=ours.patch_size,
        embed_dim=ours.embed_dims[0],
        depths=list(ours.depths),
        num_heads=list(num_heads),
        window_size=ours.window_size,
        drop_path_rate=0.0,
        encoder_stride=ours.stride,
    )
    whole = transformers.SwinForMaskedImageModeling(config) if masked else transformers.SwinModel(config)
    theirs = whole.swin if masked else whole
    theirs.embeddings.patch_embeddings.projection.load_state_dict(ours.patch_embed.proj.state_dict())
    theirs.embeddings.norm.load_state_dict(ours.patch_embed.norm.state_dict())
    for i, (stage, mine) in enumerate(zip(theirs.encoder.layers, ours.layers, strict=True)):
        if i + 1 < len(ours.layers):  # merging at the end of the stage before
            stage.downsample.load_state_dict(ours.layers[i + 1].downsample.state_dict())
        for layer, block in zip(stage.blocks, mine.blocks, strict=True):
            layer.layernorm_before.load_state_dict(block.norm1.state_dict())
            layer.layernorm_after.load_state_dict(block.norm2.state_dict())
            copy_fused(layer.attention, ("q_proj", "k_proj", "v_proj"), block.attn.qkv)
            layer.attention.o_proj.load_state_dict(block.attn.proj.state_dict())
            layer.attention.relative_position_bias.relative_position_bias_table.copy_(
                block.attn.relative_position_bias_table
            )
            layer.mlp.fc1.load_state_dict(block.mlp.fc1.state_dict())
            layer.mlp.fc2.load_state_dict(block.mlp.fc2.state_dict())
    theirs.layernorm.load_state_dict(ours.norm.state_dict())
    return whole.eval()


@torch.no_grad()
def transformers_swin_v2(
    ours: SwinTransformer, num_heads: tuple[int, ...], masked: bool = False, **changes: Any
) -> Any:
    """Swinv2Model, or Swinv2ForMaskedImageModeling without its own decoder's weights."""
    transformers = import_transformers()
    config = transformers.Swinv2Config(
        image_size=ours.image_size,
        patch_size=ours.patch_size,
        embed_dim=ours.embed_dims[0],
        depths=list(ours.depths),
        num_heads=list(num_heads),
        window_size=ours.window_size,
        drop_path_rate=0.0,
        encoder_stride=ours.stride,
        **changes,
    )
    whole = transformers.Swinv2ForMaskedImageModeling(config) if masked else transformers.Swinv2Model(config)
    theirs = whole.swinv2 if masked else whole
    theirs.embeddings.patch_embeddings.projection.load_state_dict(ours.patch_embed.proj.state_dict())
    theirs.embeddings.norm.load_state_dict(ours.patch_embed.norm.state_dict())
    for i, (stage, mine) in enumerate(zip(theirs.encoder.layers, ours.layers, strict=True)):
        if i + 1 < len(ours.layers):  # merging at the end of the stage before
            stage.downsample.load_state_dict(ours.layers[i + 1].downsample.state_dict())
        for layer, block in zip(stage.blocks, mine.blocks, strict=True):
            attention = layer.attention.self
            weights = block.attn.qkv.weight.chunk(3)
            for part, weight in zip((attention.query, attention.key, attention.value), weights, strict=True):
                part.weight.copy_(weight)
            attention.query.bias.copy_(block.attn.q_bias)
            attention.value.bias.copy_(block.attn.v_bias)
            attention.logit_scale.copy_(block.attn.logit_scale)
            attention.continuous_position_bias_mlp.load_state_dict(block.attn.cpb_mlp.state_dict())
            layer.attention.output.dense.load_state_dict(block.attn.proj.state_dict())
            layer.layernorm_before.load_state_dict(block.norm1.state_dict())
            layer.layernorm_after.load_state_dict(block.norm2.state_dict())
            layer.intermediate.dense.load_state_dict(block.mlp.fc1.state_dict())
            layer.output.dense.load_state_dict(block.mlp.fc2.state_dict())
    theirs.layernorm.load_state_dict(ours.norm.state_dict())
    return whole.eval()


def copy_fused(owner: Any, names: tuple[str, ...], fused: torch.nn.Linear) -> None:
    weights, biases = (value.chunk(len(names)) for value in (fused.weight, fused.bias))
    for name, weight, bias in zip(names, weights, biases, strict=True):
        getattr(owner, name).weight.copy_(weight)
        getattr(owner, name).bias.copy_(bias)


def timm_pvt(
    ours: PyramidVisionTransformer, num_heads: tuple[int, ...], mlp_ratios: tuple[float, ...]
) -> Any:
    import_timm()
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    theirs = PyramidVisionTransformerV2(
        depths=ours.depths,
        embed_dims=ours.embed_dims,
        num_heads=num_heads,
        mlp_ratios=mlp_ratios,
        sr_ratios=ours.sr_ratios,
        num_classes=0,
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.eval()


@torch.no_grad()
def transformers_pvt(
    ours: PyramidVisionTransformer, num_heads: tuple[int, ...], mlp_ratios: tuple[float, ...]
) -> Any:
    """PvtV2Model; its norms behind convolutions have another epsilon than the authors', which is put right."""
    transformers = import_transformers()
    config = transformers.PvtV2Config(
        depths=list(ours.depths),
        hidden_sizes=list(ours.embed_dims),
        num_attention_heads=list(num_heads),
        mlp_ratios=[int(ratio) for ratio in mlp_ratios],
        sr_ratios=list(ours.sr_ratios),
    )
    theirs = transformers.PvtV2Model(config)
    for i, (layer, stage) in enumerate(zip(theirs.encoder.layers, ours.stages, strict=True)):
        embed = ours.patch_embed if i == 0 else stage.downsample
        layer.patch_embedding.proj.load_state_dict(embed.proj.state_dict())
        layer.patch_embedding.layer_norm.load_state_dict(embed.norm.state_dict())
        layer.patch_embedding.layer_norm.eps = 1e-5
        layer.layer_norm.load_state_dict(stage.norm.state_dict())
        for theirs_block, block in zip(layer.blocks, stage.blocks, strict=True):
            theirs_block.layer_norm_1.load_state_dict(block.norm1.state_dict())
            theirs_block.layer_norm_2.load_state_dict(block.norm2.state_dict())
            attention = theirs_block.attention
            attention.query.load_state_dict(block.attn.q.state_dict())
            copy_fused(attention, ("key", "value"), block.attn.kv)
            attention.proj.load_state_dict(block.attn.proj.state_dict())
            if block.attn.sr_ratio > 1:
                attention.spatial_reduction.load_state_dict(block.attn.sr.state_dict())
                attention.layer_norm.load_state_dict(block.attn.norm.state_dict())
                attention.layer_norm.eps = 1e-5
            theirs_block.mlp.dense1.load_state_dict(block.mlp.fc1.state_dict())
            theirs_block.mlp.dwconv.dwconv.load_state_dict(block.mlp.dwconv.state_dict())
            theirs_block.mlp.dense2.load_state_dict(block.mlp.fc2.state_dict())
    return theirs.eval()
