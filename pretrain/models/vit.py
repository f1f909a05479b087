"""The vision transformer (arXiv:2010.11929), with timm's parameter names and outputs.

Built by build.py, trained inside an objective, exported as it stands.
"""

# B batch, N patches (or those kept), P prefix tokens, D width, L depth

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.keyed_random import DROP_PATH, keyed_uniform
from pretrain.models.layers import (
    Block,
    PatchEmbed,
    init_linears_truncated_normal,
    init_linears_xavier,
    layer_norm,
)
from pretrain.models.pos_embed import sincos_pos_embed


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, blocks, and a pooled feature a sample.

    pooling "cls" normalises all tokens (`norm`) and takes the class token; "avg" averages the patch
    tokens and normalises the average (`fc_norm`), both as timm does. "sincos" position embeddings are
    fixed and kept in the state dict as a buffer. Stochastic depth (arXiv:1603.09382) rises linearly to
    `drop_path_rate` at the last block.

    Weights are drawn from torch's global generator (seed it first): timm's truncated normal, or MAE's
    Xavier with weight_init="mae". Raises ConfigError for sizes that do not fit together.

    Call the module itself, or the methods below, which do: a weight read outside `forward` would not
    be gathered by ZeRO-3.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        pooling: Literal["cls", "avg"] = "cls",
        position_embedding: Literal["learned", "sincos"] = "learned",
        drop_path_rate: float = 0.0,
        weight_init: Literal["timm", "mae"] = "timm",
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"model.image_size={image_size} is not a multiple of model.patch_size={patch_size}; "
                f"take {max(image_size - image_size % patch_size, patch_size)}"
            )
        if embed_dim % num_heads:
            raise ConfigError(f"model.embed_dim={embed_dim} is not a multiple of model.num_heads={num_heads}")
        if position_embedding == "sincos" and embed_dim % 4:
            raise ConfigError(f"model.position_embedding=sincos needs embed_dim % 4 == 0: got {embed_dim}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.num_prefix_tokens = 1
        self.pooling = pooling
        self.position_embedding = position_embedding
        self.drop_path_rate = drop_path_rate

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if position_embedding == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        else:
            self.register_buffer("pos_embed", sincos_pos_embed(self.grid, embed_dim))
        self.patch_embed = PatchEmbed(patch_size=patch_size, embed_dim=embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = layer_norm(embed_dim) if pooling == "cls" else nn.Identity()
        self.fc_norm = layer_norm(embed_dim) if pooling == "avg" else nn.Identity()
        self._init_weights(weight_init)

    @torch.no_grad()
    def _init_weights(self, weight_init: Literal["timm", "mae"]) -> None:
        if weight_init == "mae":
            init_linears_xavier(self)
        else:
            init_linears_truncated_normal(self)
        nn.init.normal_(self.cls_token, std=0.02 if weight_init == "mae" else 1e-6)
        if self.position_embedding == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def features(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Pooled features (B, D), as timm's forward_head(pre_logits=True)."""
        return self(images_BCHW, sample_keys_B)

    def tokens(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Prefix and patch tokens (B, P+N, D), as timm's forward_features: normalised if pooling is "cls"."""
        return self(images_BCHW, sample_keys_B, pool=False)

    def patch_grid(self, images_BCHW: Tensor) -> Tensor:
        """Patch tokens as the map they came from (B, D, h, w)."""
        patches_BND = self.tokens(images_BCHW)[:, self.num_prefix_tokens :]
        return patches_BND.mT.unflatten(2, (self.grid, self.grid))

    def forward(
        self,
        images_BCHW: Tensor,
        sample_keys_B: Tensor | None = None,
        *,
        keep_BN: Tensor | None = None,
        pool: bool = True,
    ) -> Tensor:
        """Features (B, D), or tokens (B, P+N, D) with pool=False.

        images: float, normalised, (B, 3, S, S), cast to the weights' dtype. sample_keys: int64 (B,) of
        keyed_random.sample_keys; needed in training with stochastic depth. keep: int64 (B, N) indices of
        the patches to encode, in that order; None encodes all of them.
        """
        x_BND = self.patch_embed(images_BCHW)
        # the fixed kind is a buffer, which need not follow the parameters' dtype
        pos_embed = self.pos_embed.to(self.cls_token.dtype)
        x_BND = x_BND + pos_embed[:, 1:]
        if keep_BN is not None:
            x_BND = x_BND.gather(1, keep_BN[:, :, None].expand(-1, -1, self.embed_dim))
        cls_B1D = (self.cls_token + pos_embed[:, :1]).expand(x_BND.shape[0], -1, -1)
        x_BND = torch.cat([cls_B1D, x_BND], dim=1)
        branch_scale_BL2 = self._branch_scales(sample_keys_B, x_BND.dtype)
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, None if branch_scale_BL2 is None else branch_scale_BL2[:, i])
        x_BND = self.norm(x_BND)
        if not pool:
            return x_BND
        if self.pooling == "cls":
            return x_BND[:, 0]
        return self.fc_norm(x_BND[:, self.num_prefix_tokens :].mean(dim=1))

    def _branch_scales(self, sample_keys_B: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """(B, L, 2): 0 for a residual branch that is dropped, 1 / keep rate otherwise; None if all stay."""
        if not self.training or self.drop_path_rate == 0.0:
            return None
        assert sample_keys_B is not None, "stochastic depth needs sample_keys in training"
        draw = keyed_uniform(sample_keys_B, DROP_PATH, 2 * self.depth)
        block = torch.arange(2 * self.depth, device=draw.device) // 2
        keep = 1.0 - self.drop_path_rate * block / max(self.depth - 1, 1)
        scale = torch.where(draw < keep, 1.0 / keep, 0.0)
        return scale.unflatten(1, (self.depth, 2)).to(dtype)
