"""Masked autoencoder (arXiv:2111.06377): encode a quarter of the patches, predict the others' pixels.

Called by train.py. What is pretrained for later use is `.backbone`; the decoder is left behind.
"""

# B samples, N patches, V visible patches, D encoder width, E decoder width, P pixels of a patch x 3

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.keyed_random import MASK, keyed_uniform, sample_keys
from pretrain.models.layers import Block, init_linears_xavier, layer_norm
from pretrain.models.pos_embed import sincos_pos_embed
from pretrain.models.vit import VisionTransformer

PIXEL_VARIANCE_EPS = 1e-6


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay: num_patches · (1 - mask_ratio), rounded down.

    Raises ConfigError if that would leave none, or mask none.
    """
    # 10 · (1 - 0.9) is 0.99… in binary, and means 1
    visible = int(num_patches * (1.0 - mask_ratio) + 1e-6)
    if not 0 < visible < num_patches:
        raise ConfigError(
            f"objective.mask_ratio={mask_ratio} of {num_patches} patches leaves {visible} visible; "
            f"between 1 and {num_patches - 1} are needed"
        )
    return visible


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Images (B, 3, S, S) to pixels of patches (B, N, p·p·3): row, column, channel, as MAE orders them."""
    B, C, H, W = images_BCHW.shape
    p = patch_size
    x = images_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(pixels_BNP: Tensor, patch_size: int) -> Tensor:
    """The inverse of patchify, for a square grid of patches."""
    B, N, _ = pixels_BNP.shape
    p, grid = patch_size, int(N**0.5)
    x = pixels_BNP.reshape(B, grid, grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, 3, grid * p, grid * p)


class MAEDecoder(nn.Module):
    """Visible tokens to pixels of all patches, with fixed sine-cosine positions."""

    pos_embed: Tensor

    def __init__(
        self, *, encoder_dim: int, embed_dim: int, depth: int, num_heads: int, grid: int, patch_size: int
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise ConfigError(
                f"objective.decoder_dim={embed_dim} is not a multiple of 4 and of "
                f"objective.decoder_heads={num_heads}"
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        # not in the state dict: it follows from grid and width
        self.register_buffer("pos_embed", sincos_pos_embed(grid, embed_dim), persistent=False)
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim=embed_dim, num_heads=num_heads) for _ in range(depth))
        self.norm = layer_norm(embed_dim)
        self.pred = nn.Linear(embed_dim, patch_size * patch_size * 3)
        init_linears_xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent_BVD: Tensor, rank_BN: Tensor) -> Tensor:
        """Predicted pixels (B, N, P) from encoded tokens (B, 1+V, D), the class token first.

        rank: int64 (B, N), the place of each patch in the shuffled order whose first V are visible.
        """
        x_BVE = self.embed(latent_BVD)
        B, visible, E = x_BVE.shape
        N = rank_BN.shape[1]
        masked = self.mask_token.to(x_BVE.dtype).expand(B, N - (visible - 1), E)
        shuffled_BNE = torch.cat([x_BVE[:, 1:], masked], dim=1)
        patches_BNE = shuffled_BNE.gather(1, rank_BN[:, :, None].expand(-1, -1, E))
        x_BNE = torch.cat([x_BVE[:, :1], patches_BNE], dim=1)
        x_BNE = x_BNE + self.pos_embed.to(self.mask_token.dtype)
        for block in self.blocks:
            x_BNE = block(x_BNE)
        return self.pred(self.norm(x_BNE))[:, 1:]


class MAE(nn.Module):
    """Mean squared error on the pixels of masked patches, as a sum over masked patches.

    Which patches are masked depends on (seed, position) only. With `normalize_pixels` the target of a
    patch is standardised by its own mean and deviation. Parameters: `backbone.*`, `decoder.*`; the
    decoder's come from torch's global generator. Build the backbone with weight_init="mae" for the
    paper's initial weights.

    Raises ConfigError for a mask ratio or a decoder that does not fit, and for attention pooling, which it would
    leave untrained.
    """

    teacher: None = None

    def __init__(
        self,
        backbone: VisionTransformer,
        *,
        seed: int,
        mask_ratio: float = 0.75,
        normalize_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        if backbone.pooling == "map":
            raise ConfigError("model.pooling=map would not be trained by objective.name=mae; take cls or avg")
        self.backbone = backbone
        self.seed = seed
        self.normalize_pixels = normalize_pixels
        self.num_patches = backbone.grid**2
        self.num_visible = num_visible_patches(self.num_patches, mask_ratio)
        self.num_masked = self.num_patches - self.num_visible
        self.decoder = MAEDecoder(
            encoder_dim=backbone.embed_dim,
            embed_dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            grid=backbone.grid,
            patch_size=backbone.patch_size,
        )

    def count(self, batch: Mapping[str, Any]) -> float:
        """What the loss sum is divided by: masked patches of weighted images. Reads host `weights` (B,)."""
        return float(batch["weights"].sum()) * self.num_masked

    def forward(self, images_BCHW: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum (float32 scalar) over masked patches of weighted images; no other metrics.

        images: normalised floats (B, 3, S, S), best in float32, for the targets are taken from them.
        batch, on the images' device: weights float32 (B,), positions int64 (B,).
        """
        weights_B = batch["weights"].to(torch.float32)
        pixels_BNP, rank_BN = self._predict(images_BCHW, batch["positions"])
        target_BNP, _, _ = self._targets(images_BCHW)
        # float32: squared errors of bf16 values lose digits where they are small
        error_BN = (pixels_BNP.to(torch.float32) - target_BNP).square().mean(dim=-1)
        masked_BN = rank_BN >= self.num_visible
        # where, not a product alone: a pad's error times 0 is NaN if it overflowed
        counted_BN = masked_BN & (weights_B > 0)[:, None]
        return torch.where(counted_BN, error_BN * weights_B[:, None], 0.0).sum(), {}

    @torch.no_grad()
    def reconstruct(self, images_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the network saw and what it made of it, both float32 (B, 3, S, S), normalised as the input.

        The first has zeros (the mean colour) where patches are masked; the second keeps the visible
        patches and has predicted ones elsewhere, scaled back by the true patch's mean and deviation.
        """
        was_training = self.training
        self.eval()
        try:
            pixels_BNP, rank_BN = self._predict(images_BCHW, positions_B)
        finally:
            self.train(was_training)
        _, mean_BN1, deviation_BN1 = self._targets(images_BCHW)
        pixels_BNP = pixels_BNP.to(torch.float32) * deviation_BN1 + mean_BN1
        true_BNP = patchify(images_BCHW.to(torch.float32), self.backbone.patch_size)
        masked_BN1 = (rank_BN >= self.num_visible)[:, :, None]
        return (
            unpatchify(torch.where(masked_BN1, 0.0, true_BNP), self.backbone.patch_size),
            unpatchify(torch.where(masked_BN1, pixels_BNP, true_BNP), self.backbone.patch_size),
        )

    def _predict(self, images_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted pixels (B, N, P) and each patch's rank (B, N); ranks from num_visible on are masked."""
        keys_B = sample_keys(self.seed, positions_B)
        order_BN, rank_BN = self._shuffle(keys_B)
        latent_BVD = self.backbone(images_BCHW, keys_B, keep_BN=order_BN[:, : self.num_visible], pool=False)
        if (P := self.backbone.num_prefix_tokens) > 1:  # registers have done their work
            latent_BVD = torch.cat([latent_BVD[:, :1], latent_BVD[:, P:]], dim=1)
        if self.backbone.pooling == "avg":
            # such a backbone has no norm for tokens; the decoder needs bounded ones
            latent_BVD = self.backbone.fc_norm(latent_BVD)
        return self.decoder(latent_BVD, rank_BN), rank_BN

    def _shuffle(self, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        """A permutation of the patches for each sample (B, N), and its inverse."""
        noise_BN = keyed_uniform(keys_B, MASK, self.num_patches)
        order_BN = noise_BN.argsort(dim=1, stable=True)  # stable: ties break alike on every device
        return order_BN, order_BN.argsort(dim=1)

    def _targets(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Target pixels (B, N, P) and the mean and deviation (B, N, 1) that scale them back; float32."""
        true_BNP = patchify(images_BCHW.to(torch.float32), self.backbone.patch_size)
        if not self.normalize_pixels:
            zero = torch.zeros_like(true_BNP[:, :, :1])
            return true_BNP, zero, zero + 1.0
        mean_BN1 = true_BNP.mean(dim=-1, keepdim=True)
        deviation_BN1 = (true_BNP.var(dim=-1, keepdim=True) + PIXEL_VARIANCE_EPS).sqrt()
        return (true_BNP - mean_BN1) / deviation_BN1, mean_BN1, deviation_BN1
