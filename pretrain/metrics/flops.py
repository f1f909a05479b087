"""Work and size of vision transformers by arithmetic. Called by dry runs; no torch.

One multiply-add is two FLOPs; only matrix products count; backward is twice forward, without
recomputation. Sizes are those of models/vit.py (one class token) and objectives/mae.py.
"""

# N tokens, D width, M hidden width of the MLP

from __future__ import annotations

BACKWARD_OVER_FORWARD = 2.0
NUM_PREFIX_TOKENS = 1
CHANNELS = 3


def vit_forward_flops(
    *,
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float = 4.0,
    num_classes: int | None = None,
) -> float:
    """FLOPs of one image through the backbone, and through a linear head if there are classes."""
    num_patches = (image_size // patch_size) ** 2
    flops = _patch_embed_flops(num_patches, patch_size, embed_dim)
    flops += depth * _block_flops(num_patches + NUM_PREFIX_TOKENS, embed_dim, mlp_ratio)
    return flops + 2.0 * embed_dim * (num_classes or 0)


def vit_training_flops(
    *,
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float = 4.0,
    num_classes: int | None = None,
) -> float:
    """FLOPs of training on one image: forward and backward."""
    forward = vit_forward_flops(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        mlp_ratio=mlp_ratio,
        num_classes=num_classes,
    )
    return (1.0 + BACKWARD_OVER_FORWARD) * forward


def mae_training_flops(
    *,
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float = 4.0,
    mask_ratio: float = 0.75,
    decoder_dim: int = 512,
    decoder_depth: int = 8,
) -> float:
    """FLOPs of training a masked autoencoder on one image, decoder included."""
    num_patches = (image_size // patch_size) ** 2
    num_visible = int(num_patches * (1.0 - mask_ratio) + 1e-6) + NUM_PREFIX_TOKENS
    num_tokens = num_patches + NUM_PREFIX_TOKENS
    encoder = _patch_embed_flops(num_patches, patch_size, embed_dim)
    encoder += depth * _block_flops(num_visible, embed_dim, mlp_ratio)
    decoder = 2.0 * num_visible * embed_dim * decoder_dim
    decoder += decoder_depth * _block_flops(num_tokens, decoder_dim, 4.0)
    decoder += 2.0 * num_tokens * decoder_dim * CHANNELS * patch_size**2
    return (1.0 + BACKWARD_OVER_FORWARD) * (encoder + decoder)


def vit_parameters(
    *,
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    mlp_ratio: float = 4.0,
    position_embedding: str = "learned",
    num_classes: int | None = None,
) -> int:
    """Trained parameters of the backbone, and of a linear head if there are classes."""
    D = embed_dim
    total = D + _linear(CHANNELS * patch_size**2, D) + depth * _block_parameters(D, mlp_ratio) + 2 * D
    if position_embedding == "learned":
        total += ((image_size // patch_size) ** 2 + NUM_PREFIX_TOKENS) * D
    return total + (_linear(D, num_classes) if num_classes else 0)


def mae_decoder_parameters(
    *, patch_size: int, embed_dim: int, decoder_dim: int = 512, decoder_depth: int = 8
) -> int:
    """Trained parameters that a masked autoencoder has beside its backbone."""
    E = decoder_dim
    total = E + _linear(embed_dim, E) + decoder_depth * _block_parameters(E, 4.0) + 2 * E
    return total + _linear(E, CHANNELS * patch_size**2)


def _patch_embed_flops(num_patches: int, patch_size: int, embed_dim: int) -> float:
    return 2.0 * num_patches * CHANNELS * patch_size**2 * embed_dim


def _block_flops(num_tokens: int, embed_dim: int, mlp_ratio: float) -> float:
    N, D, M = num_tokens, embed_dim, round(embed_dim * mlp_ratio)
    projections = 2.0 * N * D * (4 * D + 2 * M)  # qkv and output, then the MLP's two
    return projections + 4.0 * N * N * D  # scores, and their product with the values


def _block_parameters(embed_dim: int, mlp_ratio: float) -> int:
    D, M = embed_dim, round(embed_dim * mlp_ratio)
    return 4 * D + _linear(D, 3 * D) + _linear(D, D) + _linear(D, M) + _linear(M, D)  # 4 D: two norms


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs
