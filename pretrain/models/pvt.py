"""The pyramid vision transformer, version 2 (arXiv:2106.13797), with timm's parameter names and outputs.

Built by build.py, trained inside an objective. Keys and values are shrunk before attention, patches overlap, and a
depthwise convolution in each MLP stands for positions.
"""

# B batch, N tokens, C width, H heads, L depth

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models.drop_path import scaled, scales_by_stage
from pretrain.models.layers import (
    AttentionWatch,
    PatchProjection,
    attention,
    init_linears_truncated_normal,
    layer_norm,
    replace_masked,
)
from pretrain.models.sizes import mlp_width

# The authors' and timm's: 1e-6 in and behind the blocks, torch's default elsewhere. transformers has 1e-6 everywhere.
EMBED_NORM_EPS = 1e-5

Grid = tuple[int, int]


class PyramidVisionTransformer(nn.Module):
    """Overlapping patches of stride 4, stages at strides 4 to 32, and the mean of the last one's normalised tokens.

    One value a stage: embed_dims, depths, num_heads, mlp_ratios, and sr_ratios, by which keys and values are shrunk a
    side. The attribute embed_dim is the features' width, the last stage's. Any image goes whose stages are not
    smaller than what they are shrunk by; sides are rounded up at each stage.

    Stochastic depth is per sample, as in vit.py. Weights are drawn from torch's global generator. Raises ConfigError
    for an image_size that is too small.
    """

    patch_size = 4  # the stride of the first patches, which are 7 pixels wide

    def __init__(
        self,
        *,
        image_size: int,
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8.0, 8.0, 4.0, 4.0),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.depths = tuple(depths)
        self.depth = sum(depths)
        self.num_heads = tuple(num_heads)
        self.embed_dims = tuple(embed_dims)
        self.embed_dim = self.embed_dims[-1]
        self.sr_ratios = tuple(sr_ratios)
        self.strides = tuple(self.patch_size << stage for stage in range(len(depths)))
        self.stride = self.strides[-1]
        self.pooling = "avg"
        self.drop_path_rate = drop_path_rate
        try:
            self._check_side(image_size)
        except ValueError as error:
            raise ConfigError(f"model.image_size={image_size}: {error}") from None

        self.patch_embed = OverlapPatchEmbed(
            patch_size=7, stride=self.patch_size, channels=3, embed_dim=embed_dims[0]
        )
        self.stages = nn.ModuleList(
            Stage(
                in_dim=embed_dims[max(i - 1, 0)],
                embed_dim=embed_dims[i],
                depth=depths[i],
                num_heads=num_heads[i],
                mlp_ratio=mlp_ratios[i],
                sr_ratio=sr_ratios[i],
                downsample=i > 0,
            )
            for i in range(len(depths))
        )
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        init_linears_truncated_normal(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | PatchProjection):
                fan_out = math.prod(module.weight.shape[2:]) * module.weight.shape[0]
                if isinstance(module, nn.Conv2d):
                    fan_out //= module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                assert module.bias is not None, "all of them have one"
                nn.init.zeros_(module.bias)

    def features(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> Tensor:
        """Pooled features (B, D), as timm's forward_head(pre_logits=True)."""
        return self(images_BCHW, sample_keys_B)

    def patch_grid(
        self,
        images_BCHW: Tensor,
        sample_keys_B: Tensor | None = None,
        *,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Normalised tokens of the last stage in their places, (B, D, H/32, W/32), rounded up."""
        return self(images_BCHW, sample_keys_B, mask_BN=mask_BN, mask_token=mask_token, pool=False)[-1]

    def feature_maps(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> dict[str, Tensor]:
        """What each stage gives, by stride: {"4": (B, C, H/4, W/4) …}, rounded up, normalised."""
        maps = self(images_BCHW, sample_keys_B, pool=False)
        return {str(stride): map_ for stride, map_ in zip(self.strides, maps, strict=True)}

    def forward(
        self,
        images_BCHW: Tensor,
        sample_keys_B: Tensor | None = None,
        *,
        mask_BN: Tensor | None = None,
        mask_token: Tensor | None = None,
        pool: bool = True,
    ) -> Tensor | list[Tensor]:
        """Features (B, D), or with pool=False the stages' maps (B, C, H/s, W/s), normalised.

        images: float, normalised, (B, 3, H, W), cast to the weights' dtype. sample_keys: int64 (B,) of
        keyed_random.sample_keys; needed in training with stochastic depth. mask: bool (B, N), row by row, the
        patches whose embedding `mask_token` (1, 1, embed_dims[0]) replaces; as patches overlap, those beside have
        seen some of its pixels. Raises ValueError for images that are too small.
        """
        for side in images_BCHW.shape[-2:]:
            self._check_side(side)
        x_BCHW = self.patch_embed(images_BCHW)
        H, W = x_BCHW.shape[-2:]
        if mask_BN is not None:
            x_BNC = replace_masked(x_BCHW.flatten(2).transpose(1, 2), mask_BN, mask_token)
            x_BCHW = x_BNC.transpose(1, 2).unflatten(2, (H, W))
        rate = self.drop_path_rate if self.training else 0.0
        scales = scales_by_stage(sample_keys_B, rate=rate, depths=self.depths, dtype=x_BCHW.dtype)
        maps = []
        for stage, scale_BL2 in zip(self.stages, scales, strict=True):
            x_BCHW = stage(x_BCHW, scale_BL2)
            maps.append(x_BCHW)
        return x_BCHW.mean(dim=(2, 3)) if pool else maps

    def _check_side(self, side: int) -> None:
        for stride, sr_ratio in zip(self.strides, self.sr_ratios, strict=True):
            if math.ceil(side / stride) < sr_ratio:
                raise ValueError(
                    f"an image side of {side} pixels leaves {math.ceil(side / stride)} tokens at stride {stride}, "
                    f"where keys are shrunk by {sr_ratio}: give {stride * sr_ratio} pixels at least"
                )


class OverlapPatchEmbed(nn.Module):
    """A convolution wider than its stride, then a norm: (B, C, H, W) to (B, D, H/s, W/s), rounded up."""

    def __init__(self, *, patch_size: int, stride: int, channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(
            patch_size=patch_size,
            embed_dim=embed_dim,
            channels=channels,
            stride=stride,
            padding=patch_size // 2,
        )
        self.norm = layer_norm(embed_dim, eps=EMBED_NORM_EPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Patches of the stage before, where there is one, blocks and a norm: (B, C, H, W) to the same form."""

    def __init__(
        self,
        *,
        in_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        downsample: bool,
    ) -> None:
        super().__init__()
        self.downsample = (
            OverlapPatchEmbed(patch_size=3, stride=2, channels=in_dim, embed_dim=embed_dim)
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.ModuleList(
            Block(embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, sr_ratio=sr_ratio)
            for _ in range(depth)
        )
        self.norm = layer_norm(embed_dim)

    def forward(self, x_BCHW: Tensor, branch_scale_BL2: Tensor | None) -> Tensor:
        x_BCHW = self.downsample(x_BCHW)
        grid = (x_BCHW.shape[2], x_BCHW.shape[3])
        x_BNC = x_BCHW.flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            x_BNC = block(x_BNC, grid, None if branch_scale_BL2 is None else branch_scale_BL2[:, i])
        return self.norm(x_BNC).transpose(1, 2).unflatten(2, grid)


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch that stochastic depth may scale."""

    def __init__(self, *, embed_dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(embed_dim)
        self.attn = ReducedAttention(embed_dim=embed_dim, num_heads=num_heads, sr_ratio=sr_ratio)
        self.norm2 = layer_norm(embed_dim)
        self.mlp = ConvolutionMlp(embed_dim=embed_dim, hidden_dim=mlp_width(embed_dim, mlp_ratio))

    def forward(self, x_BNC: Tensor, grid: Grid, branch_scale_B2: Tensor | None = None) -> Tensor:
        x_BNC = x_BNC + scaled(self.attn(self.norm1(x_BNC), grid), branch_scale_B2, 0)
        return x_BNC + scaled(self.mlp(self.norm2(x_BNC), grid), branch_scale_B2, 1)


class ReducedAttention(nn.Module):
    """Multi-head attention of all tokens to keys and values on a grid that is sr_ratio times smaller a side.

    `watch`: as of layers.Attention.
    """

    watch: AttentionWatch | None = None

    def __init__(self, *, embed_dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(embed_dim, embed_dim)
        self.kv = nn.Linear(embed_dim, 2 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dim, embed_dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = layer_norm(embed_dim, eps=EMBED_NORM_EPS)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        B, N, C = x_BNC.shape
        H, K = self.num_heads, C // self.num_heads
        query = self.q(x_BNC).reshape(B, N, H, K).transpose(1, 2)
        small_BMC = x_BNC
        if self.sr_ratio > 1:
            small_BMC = self.sr(x_BNC.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
            small_BMC = self.norm(small_BMC)
        key, value = self.kv(small_BMC).reshape(B, -1, 2, H, K).permute(2, 0, 3, 1, 4).unbind(0)
        if self.watch is not None:
            self.watch(query, key, None)
        return self.proj(attention(query, key, value).transpose(1, 2).reshape(B, N, C))


class ConvolutionMlp(nn.Module):
    """Two layers with a 3 × 3 depthwise convolution over the grid and an exact GELU between them."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        x_BCHW = self.fc1(x_BNC).transpose(1, 2).unflatten(2, grid)
        return self.fc2(F.gelu(self.dwconv(x_BCHW).flatten(2).transpose(1, 2)))
