"""transformers' ViTMAEForPreTraining and ViTModel with the weights of ours; fixed positions are their own."""

from __future__ import annotations

from typing import Any

import torch
from staged_references import copy_fused
from timm_reference import import_transformers

from pretrain.models.vit import VisionTransformer
from pretrain.objectives.mae import MAE


def copy_block(theirs: Any, ours: Any) -> None:
    theirs.layernorm_before.load_state_dict(ours.norm1.state_dict())
    theirs.layernorm_after.load_state_dict(ours.norm2.state_dict())
    copy_fused(theirs.attention, ("q_proj", "k_proj", "v_proj"), ours.attn.qkv)
    theirs.attention.o_proj.load_state_dict(ours.attn.proj.state_dict())
    theirs.mlp.fc1.load_state_dict(ours.mlp.fc1.state_dict())
    theirs.mlp.fc2.load_state_dict(ours.mlp.fc2.state_dict())


def copy_encoder(theirs: Any, ours: VisionTransformer) -> None:
    theirs.embeddings.cls_token.copy_(ours.cls_token)
    if isinstance(
        ours.pos_embed, torch.nn.Parameter
    ):  # a fixed table stays theirs, so that it is compared, too
        theirs.embeddings.position_embeddings.copy_(ours.pos_embed)
    theirs.embeddings.patch_embeddings.projection.load_state_dict(ours.patch_embed.proj.state_dict())
    for layer, block in zip(theirs.layers, ours.blocks, strict=True):
        copy_block(layer, block)
    theirs.layernorm.load_state_dict(ours.norm.state_dict())


def encoder_config(ours: VisionTransformer) -> dict[str, Any]:
    return {
        "hidden_size": ours.embed_dim,
        "num_hidden_layers": ours.depth,
        "num_attention_heads": ours.num_heads[0],
        "intermediate_size": ours.blocks[0].mlp.fc1.out_features,
        "layer_norm_eps": 1e-6,
        "image_size": ours.image_size,
        "patch_size": ours.patch_size,
    }


@torch.no_grad()
def transformers_vit(ours: VisionTransformer) -> Any:
    transformers = import_transformers()
    theirs = transformers.ViTModel(transformers.ViTConfig(**encoder_config(ours)), add_pooling_layer=False)
    copy_encoder(theirs, ours)
    return theirs.eval()


def make_tables(theirs: Any, num_patches: int) -> None:
    """Both fixed tables of positions by transformers' own code; its constructor alone (5.23) leaves them at zero."""
    theirs.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False  # else it returns at once
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(num_patches)


@torch.no_grad()
def transformers_mae(ours: MAE) -> Any:
    transformers = import_transformers()
    blocks = ours.decoder.blocks
    config = transformers.ViTMAEConfig(
        **encoder_config(ours.backbone),
        decoder_hidden_size=ours.decoder.embed.out_features,
        decoder_num_hidden_layers=len(blocks),
        decoder_num_attention_heads=blocks[0].attn.num_heads,
        decoder_intermediate_size=blocks[0].mlp.fc1.out_features,
        mask_ratio=1 - ours.num_visible / ours.num_patches,
        norm_pix_loss=ours.normalize_pixels,
    )
    theirs = transformers.ViTMAEForPreTraining(config)
    make_tables(theirs, ours.num_patches)
    copy_encoder(theirs.vit, ours.backbone)
    decoder = theirs.decoder
    decoder.mask_token.copy_(ours.decoder.mask_token)
    decoder.decoder_embed.load_state_dict(ours.decoder.embed.state_dict())
    for layer, block in zip(decoder.decoder_layers, blocks, strict=True):
        copy_block(layer, block)
    decoder.decoder_norm.load_state_dict(ours.decoder.norm.state_dict())
    decoder.decoder_pred.load_state_dict(ours.decoder.pred.state_dict())
    return theirs
