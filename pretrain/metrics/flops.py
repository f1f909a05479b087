"""Work and size of vision transformers by arithmetic. Called by dry runs, through cost.py; no torch.

One multiply-add is two FLOPs; only matrix products count; backward is twice forward, without
recomputation. The networks are those of models/vit.py and objectives/; pyramids.py has Swin and PVT.
"""

# N tokens, D width, M width of the MLP's first layer, K classes, E width of a decoder

from __future__ import annotations

from pretrain.metrics.blocks import Blocks, Network, linear

BACKWARD_OVER_FORWARD = 2.0
CHANNELS = 3


def vit_network(
    *,
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    hidden_dim: int,
    gated: bool = False,
    pooling: str = "cls",
    position_embedding: str = "learned",
    num_registers: int = 0,
    qk_norm: bool = False,
    layer_scale: bool = False,
    computed: float = 1.0,
    visible: float = 1.0,
) -> Network:
    """A vision transformer, as models/vit.py builds it: patches, a class token, registers.

    hidden_dim, gated: of the MLP, as in `Blocks`. computed: the share of residual branches that stochastic depth
    leaves to be computed. visible: the share of patches that are encoded, of a masked autoencoder. num_heads counts
    only with qk_norm and in memory.
    """
    D, M = embed_dim, 2 * hidden_dim if gated else hidden_dim
    num_patches = (image_size // patch_size) ** 2
    prefix = 1 + num_registers
    # 10 · (1 - 0.9) is 0.99… in binary, and means 1
    num_tokens = int(num_patches * visible + 1e-6) + prefix
    patch_inputs = CHANNELS * patch_size**2
    other_flops = 2.0 * num_patches * patch_inputs * D
    other = linear(patch_inputs, D) + prefix * D + 2 * D
    if position_embedding == "learned":  # registers have no positions, and then the class token has none
        other += (num_patches + (0 if num_registers else 1)) * D
    if pooling == "map":
        pooled = num_tokens - prefix
        other += D + linear(D, D) + linear(D, 2 * D) + linear(D, D) + 2 * D + linear(D, M) + linear(M, D)
        other_flops += 4.0 * pooled * D * D + 4.0 * pooled * D + 4.0 * D * D + 4.0 * D * M
    blocks = Blocks(
        depth=depth,
        num_tokens=num_tokens,
        embed_dim=D,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        gated=gated,
        qk_norm=qk_norm,
        layer_scale=layer_scale,
        computed=computed,
    )
    return Network(
        blocks=[blocks],
        other_flops=other_flops,
        other_parameters=other,
        other_kept_values=2.0 * num_tokens * D + float(num_patches) * patch_inputs,  # the norm; the images
        out_dim=D,
        out_tokens=num_patches,
    )


def head_network(*, in_features: int, num_classes: int | None) -> Network:
    """A linear classifier of one feature; nothing where there are no classes."""
    K = num_classes or 0
    return Network(
        blocks=[],
        other_flops=2.0 * in_features * K,
        other_parameters=linear(in_features, K) if K else 0,
        other_kept_values=0.0,
        out_dim=K,
        out_tokens=1,
        other_kept_float32=2.0 * K,  # logits and their softmax
    )


def mae_decoder_network(
    *,
    image_size: int,
    patch_size: int,
    encoder_dim: int,
    num_visible: int,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
    decoder_heads: int = 16,
) -> Network:
    """What a masked autoencoder has beside its backbone; num_visible: tokens it gets of it, class token included."""
    E, num_patches = decoder_dim, (image_size // patch_size) ** 2
    num_tokens, pixels = num_patches + 1, CHANNELS * patch_size**2
    blocks = Blocks(
        depth=decoder_depth, num_tokens=num_tokens, embed_dim=E, hidden_dim=4 * E, num_heads=decoder_heads
    )
    return Network(
        blocks=[blocks],
        other_flops=2.0 * num_visible * encoder_dim * E + 2.0 * num_tokens * E * pixels,
        other_parameters=E + linear(encoder_dim, E) + 2 * E + linear(E, pixels),
        other_kept_values=2.0 * num_tokens * E,  # the norm
        out_dim=pixels,
        out_tokens=num_tokens,
        other_kept_float32=float(num_patches) * pixels,  # the error, to be squared
    )


def simmim_network(*, backbone: Network, mask_dim: int, stride: int) -> Network:
    """SimMIM's prediction head (arXiv:2111.09886): the last map's tokens to the pixels of stride x stride each, and
    a mask token of the patch embedding's width.
    """
    pixels = CHANNELS * stride**2
    return Network(
        blocks=[],
        other_flops=2.0 * backbone.out_tokens * backbone.out_dim * pixels,
        other_parameters=mask_dim + linear(backbone.out_dim, pixels),
        other_kept_values=0.0,
        out_dim=pixels,
        out_tokens=backbone.out_tokens,
        other_kept_float32=float(backbone.out_tokens) * pixels,  # the error, whose sign is needed
    )


def training_flops(network: Network) -> float:
    """FLOPs of training on one image: forward and backward."""
    return (1.0 + BACKWARD_OVER_FORWARD) * network.flops()
