"""The vision transformer (arXiv:2010.11929), with timm's parameter names and outputs.

Built by build.py, trained inside an objective, exported as it stands.
"""

# B batch, N patches (or those kept), P prefix tokens, D width, L depth

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.drop_path import branch_scales, kept_subsets
from pretrain.models.layers import (
    AttentionPool,
    Block,
    PatchEmbed,
    init_linears_truncated_normal,
    init_linears_xavier,
    layer_norm,
    replace_masked,
)
from pretrain.models.pos_embed import resample_pos_embed, sincos_pos_embed
from pretrain.models.rotary import axial_rotary
from pretrain.models.sizes import mlp_width, swiglu_width

Pooling = Literal["cls", "avg", "map"]
PositionEmbedding = Literal["learned", "sincos", "rope"]
MlpKind = Literal["gelu", "swiglu"]
DropPathMode = Literal["per_sample", "batch_subset"]


class VisionTransformer(nn.Module):
    """Patches, a class token, position embeddings, blocks, and a pooled feature a sample.

    pooling "cls" normalises all tokens (`norm`) and takes the class token; "avg" averages the patch tokens and
    normalises the average (`fc_norm`); "map" normalises all tokens and lets a trained query attend to the patches
    (`attn_pool`), all three as timm does. The class token is always there.

    position_embedding "learned" is added to patches and class token; "sincos" is the same, fixed, and kept in the
    state dict as a buffer; "rope" turns queries and keys in every block (rotary.py) and has no weights; its positions
    are scaled to rotary_grid patches a side, or to image_size's. With num_registers (arXiv:2309.16588) the added
    positions are the patches' only, as in timm's models with registers.

    Stochastic depth (arXiv:1603.09382) rises linearly to `drop_path_rate` at the last block; drop_path_mode
    "batch_subset" does not compute what it drops, and then depends on the micro-batch (drop_path.py).

    Weights are drawn from torch's global generator (seed it first): timm's truncated normal, or MAE's
    Xavier with weight_init="mae". Raises ConfigError for sizes that do not fit together.

    Call the module itself, or the methods below, which do: a weight read outside `forward` would not
    be gathered by ZeRO-3.
    """

    pos_embed: Tensor | None
    reg_token: nn.Parameter | None

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        pooling: Pooling = "cls",
        position_embedding: PositionEmbedding = "learned",
        rotary_grid: int | None = None,
        num_registers: int = 0,
        layer_scale_init: float | None = None,
        qk_norm: bool = False,
        mlp: MlpKind = "gelu",
        drop_path_rate: float = 0.0,
        drop_path_mode: DropPathMode = "per_sample",
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
        head_dim = embed_dim // num_heads
        if position_embedding == "rope" and head_dim % 4:
            raise ConfigError(
                f"model.position_embedding=rope needs heads whose width is a multiple of 4: got {head_dim}"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.stride = patch_size
        self.embed_dim = embed_dim
        self.embed_dims = (embed_dim,)
        self.head_dim = head_dim
        self.depth = depth
        self.depths = (depth,)
        self.num_heads = (num_heads,)
        self.num_prefix_tokens = 1 + num_registers
        # prefix tokens that have a position of their own
        self.num_position_prefix = 1 if num_registers == 0 else 0
        self.pooling = pooling
        self.position_embedding = position_embedding
        self.rotary_grid = rotary_grid or self.grid
        self.drop_path_rate = drop_path_rate
        self.drop_path_mode = drop_path_mode

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, embed_dim)) if num_registers else None
        if position_embedding == "learned":
            num_positions = self.num_position_prefix + self.grid**2
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, embed_dim))
        elif position_embedding == "sincos":
            fixed = sincos_pos_embed(self.grid, embed_dim, num_prefix_tokens=self.num_position_prefix)
            self.register_buffer("pos_embed", fixed)
        else:
            self.pos_embed = None
        self.patch_embed = PatchEmbed(patch_size=patch_size, embed_dim=embed_dim)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                mlp=mlp,
                qk_norm=qk_norm,
                layer_scale_init=layer_scale_init,
            )
            for _ in range(depth)
        )
        self.norm = nn.Identity() if pooling == "avg" else layer_norm(embed_dim)
        if pooling == "map":
            hidden_dim = mlp_width(embed_dim, mlp_ratio)
            if mlp == "swiglu":  # as wide as fc1 of the blocks, as timm has it
                hidden_dim = 2 * swiglu_width(hidden_dim)
            self.attn_pool = AttentionPool(embed_dim=embed_dim, num_heads=num_heads, hidden_dim=hidden_dim)
        self.fc_norm = layer_norm(embed_dim) if pooling == "avg" else nn.Identity()
        self._init_weights(weight_init)

    @torch.no_grad()
    def _init_weights(self, weight_init: Literal["timm", "mae"]) -> None:
        if weight_init == "mae":
            init_linears_xavier(self)
        else:
            init_linears_truncated_normal(self)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02 if weight_init == "mae" else 1e-6)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def features(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Pooled features (B, D), as timm's forward_head(pre_logits=True)."""
        return self(images_BCHW, sample_keys_B)

    def tokens(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Prefix and patch tokens (B, P+N, D), as timm's forward_features: normalised unless pooling is "avg"."""
        return self(images_BCHW, sample_keys_B, pool=False)

    def patch_grid(
        self,
        images_BCHW: Tensor,
        sample_keys_B: Tensor | None = None,
        *,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Normalised patch tokens in their places, (B, D, h, w). mask, mask_token: as forward takes them."""
        x_BND = self(images_BCHW, sample_keys_B, mask_BN=mask_BN, mask_token=mask_token, pool=False)
        height, width = self._grid_of(images_BCHW)
        # with average pooling the tokens are not normalised yet, and its norm is the one there is
        x_BND = self.fc_norm(x_BND[:, self.num_prefix_tokens :])
        return x_BND.transpose(1, 2).unflatten(2, (height, width))

    def feature_maps(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> dict[str, Tensor]:
        """Feature maps by their stride: one, {"16": (B, D, h, w)} for patches of 16 pixels, normalised."""
        return {str(self.patch_size): self.patch_grid(images_BCHW, sample_keys_B)}

    def forward(
        self,
        images_BCHW: Tensor,
        sample_keys_B: Tensor | None = None,
        *,
        keep_BN: Tensor | None = None,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        pool: bool = True,
    ) -> Tensor:
        """Features (B, D), or tokens (B, P+N, D) with pool=False.

        images: float, normalised, (B, 3, H, W), cast to the weights' dtype; at another size than image_size
        positions are resampled (learned and sincos: bicubic, antialiased, as timm does). sample_keys: int64 (B,) of
        keyed_random.sample_keys; needed in training with stochastic depth. keep: int64 (B, N) indices of
        the patches to encode, in that order; None encodes all of them. mask: bool (B, N), the patches whose
        embedding `mask_token` (1, 1, D) replaces before positions are added. Raises ValueError for images whose
        sides are not multiples of the patch size.
        """
        grid = self._grid_of(images_BCHW)
        x_BND = replace_masked(self.patch_embed(images_BCHW), mask_BN, mask_token)
        cls_11D: Tensor = self.cls_token
        if self.pos_embed is not None:
            # the fixed kind is a buffer, which need not follow the parameters' dtype
            pos_embed = self.pos_embed.to(self.cls_token.dtype)
            pos_embed = resample_pos_embed(pos_embed, grid, self.num_position_prefix)
            x_BND = x_BND + pos_embed[:, self.num_position_prefix :]
            if self.num_position_prefix:
                cls_11D = cls_11D + pos_embed[:, :1]
        if keep_BN is not None:
            x_BND = x_BND.gather(1, keep_BN[:, :, None].expand(-1, -1, self.embed_dim))
        prefix = [cls_11D] if self.reg_token is None else [cls_11D, self.reg_token]
        x_BND = torch.cat([*(token.expand(x_BND.shape[0], -1, -1) for token in prefix), x_BND], dim=1)
        x_BND = self.norm(self._encode(x_BND, sample_keys_B, self._rope(grid, keep_BN, x_BND.device)))
        if not pool:
            return x_BND
        if self.pooling == "cls":
            return x_BND[:, 0]
        patches_BND = x_BND[:, self.num_prefix_tokens :]
        return self.attn_pool(patches_BND) if self.pooling == "map" else self.fc_norm(patches_BND.mean(dim=1))

    def _encode(self, x_BND: Tensor, sample_keys_B: Tensor | None, rope: Tensor | None) -> Tensor:
        scales_BL2 = self._branch_scales(sample_keys_B, x_BND.dtype)
        kept: list[Tensor | None] = [None] * self.depth
        if scales_BL2 is not None and self.drop_path_mode == "batch_subset":
            kept = kept_subsets(sample_keys_B, rate=self.drop_path_rate, depth=self.depth)
        for i, block in enumerate(self.blocks):
            scale_B2 = None if scales_BL2 is None else scales_BL2[:, i]
            x_BND = block(x_BND, scale_B2, rope=rope, kept_2S=kept[i])
        return x_BND

    def _branch_scales(self, sample_keys_B: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """(B, L, 2): 0 for a residual branch that is dropped, 1 / keep rate otherwise; None if all stay."""
        if not self.training or self.drop_path_rate == 0.0:
            return None
        return branch_scales(sample_keys_B, rate=self.drop_path_rate, depth=self.depth, dtype=dtype)

    def _rope(self, grid: tuple[int, int], keep_BN: Tensor | None, device: torch.device) -> Tensor | None:
        """Rotary angles of prefix and patches, (2, P+N, K), or (2, B, P+N, K) of the kept ones; None without."""
        if self.position_embedding != "rope":
            return None
        P, K = self.num_prefix_tokens, self.head_dim
        rope_2NK = axial_rotary(
            grid, trained_grid=self.rotary_grid, head_dim=K, num_prefix_tokens=P, device=device
        )
        if keep_BN is None:
            return rope_2NK
        prefix_2BPK = rope_2NK[:, None, :P].expand(-1, len(keep_BN), -1, -1)
        return torch.cat([prefix_2BPK, rope_2NK[:, P:][:, keep_BN]], dim=2)

    def _grid_of(self, images_BCHW: Tensor) -> tuple[int, int]:
        height, width = images_BCHW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height}×{width} pixels are not cut into patches of {self.patch_size}: "
                f"give sides that are multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size
