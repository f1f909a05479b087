"""The Swin transformer, versions 1 (arXiv:2103.14030) and 2 (arXiv:2111.09883), with timm's parameter names.

Its outputs are transformers' and, where stages are whole windows, timm's.

Built by build.py, trained inside an objective. Attention stays inside windows, which every second block shifts;
patches are merged two by two between stages. Here is what both versions share, and the first one's blocks; the
second one's are in swin_v2.py.
"""

# B batch, H W rows and columns of tokens, C width, W windows, T tokens of a window, L depth

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.models import swin_v2
from pretrain.models.drop_path import scaled, scales_by_stage
from pretrain.models.layers import (
    AttentionWatch,
    Mlp,
    PatchProjection,
    init_linears_truncated_normal,
    layer_norm,
    replace_masked,
)
from pretrain.models.sizes import mlp_width, position_windows, stage_windows
from pretrain.models.swin_parts import (
    LAYER_NORM_EPS,
    Window,
    attend_in_windows,
    attention_of_windows,
    biases_of_pairs,
    relative_index,
    shifted_mask,
    two_by_two,
)

SwinVersion = Literal[1, 2]


class SwinTransformer(nn.Module):
    """Patches of 4 pixels, stages of windowed attention at strides 4 to 32, and the mean of the normalised tokens.

    embed_dim: width of the first stage, doubled at each merging (the attribute of that name is the features'
    width, the last stage's). window_size: tokens a side; a stage that is smaller at `image_size` has a window of its
    own size, and no shift. Images of other sizes are padded to whole patches and windows.

    version: 2 is Swin V2, which measures offsets by windows of pretrained_window_sizes tokens a side, one a stage, 0
    for the window that the stage has: given those that its weights were trained with, an offset has the same bias in
    any other window.

    Stochastic depth is per sample, as in vit.py. Weights are drawn from torch's global generator. Raises ConfigError
    for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        version: SwinVersion = 1,
        pretrained_window_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ConfigError(
                f"model.image_size={image_size} is not a multiple of model.patch_size={patch_size}; "
                f"take {max(image_size - image_size % patch_size, patch_size)}"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.depths = tuple(depths)
        self.depth = sum(depths)
        self.num_heads = tuple(num_heads)
        self.embed_dims = tuple(embed_dim << stage for stage in range(len(depths)))
        self.embed_dim = self.embed_dims[-1]
        self.strides = tuple(patch_size << stage for stage in range(len(depths)))
        self.stride = self.strides[-1]
        self.window_size = window_size
        self.version = version
        self.pooling = "avg"
        self.drop_path_rate = drop_path_rate

        self.patch_embed = PatchEmbed(patch_size=patch_size, embed_dim=embed_dim)
        windows = stage_windows(image_size // patch_size, window_size, len(depths))
        # windows that the second version's offsets are measured by; the first has a table for its own
        self.position_windows: tuple[int, ...] | None = None
        if version == 2:
            self.position_windows = position_windows(windows, pretrained_window_sizes)
        self.layers = nn.ModuleList(
            Stage(
                in_dim=self.embed_dims[max(i - 1, 0)],
                embed_dim=width,
                depth=depths[i],
                num_heads=num_heads[i],
                window_size=windows[i],
                mlp_ratio=mlp_ratio,
                downsample=i > 0,
                position_window=None if self.position_windows is None else self.position_windows[i],
            )
            for i, width in enumerate(self.embed_dims)
        )
        self.norm = layer_norm(self.embed_dim, eps=LAYER_NORM_EPS)
        init_linears_truncated_normal(self)

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
        maps = self(images_BCHW, sample_keys_B, mask_BN=mask_BN, mask_token=mask_token, pool=False)
        return self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def feature_maps(self, images_BCHW: Tensor, sample_keys_B: Tensor | None = None) -> dict[str, Tensor]:
        """What each stage gives, by stride: {"4": (B, C, H/4, W/4) …}, rounded up and not normalised."""
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
        """Features (B, D), or with pool=False the stages' maps (B, C, H/s, W/s), not normalised.

        images: float, normalised, (B, 3, H, W), cast to the weights' dtype. sample_keys: int64 (B,) of
        keyed_random.sample_keys; needed in training with stochastic depth. mask: bool (B, N), row by row, the
        patches whose embedding `mask_token` (1, 1, embed_dims[0]) replaces.
        """
        x_BHWC = self.patch_embed(images_BCHW)
        grid = x_BHWC.shape[1:3]
        x_BHWC = replace_masked(x_BHWC.flatten(1, 2), mask_BN, mask_token).unflatten(1, grid)
        rate = self.drop_path_rate if self.training else 0.0
        scales = scales_by_stage(sample_keys_B, rate=rate, depths=self.depths, dtype=x_BHWC.dtype)
        maps = []
        for stage, scale_BL2 in zip(self.layers, scales, strict=True):
            x_BHWC = stage(x_BHWC, scale_BL2)
            maps.append(x_BHWC)
        if not pool:
            return [map_.permute(0, 3, 1, 2) for map_ in maps]
        return self.norm(x_BHWC).mean(dim=(1, 2))


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to normalised patch tokens (B, H/p, W/p, C); what is short of a patch is padded with 0."""

    def __init__(self, *, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(patch_size=patch_size, embed_dim=embed_dim)
        self.norm = layer_norm(embed_dim, eps=LAYER_NORM_EPS)
        # torch's rule for convolutions, which the authors left as it is
        bound = (3 * patch_size * patch_size) ** -0.5
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        height, width = images_BCHW.shape[-2:]
        p = self.patch_size
        if height % p or width % p:
            images_BCHW = F.pad(images_BCHW, (0, -width % p, 0, -height % p))
        return self.norm(self.proj(images_BCHW).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Tokens (B, H, W, C) two by two to (B, H/2, W/2, 2C); odd sides are padded with 0."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__()
        self.norm = layer_norm(4 * embed_dim, eps=LAYER_NORM_EPS)
        self.reduction = nn.Linear(4 * embed_dim, 2 * embed_dim, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.reduction(self.norm(two_by_two(x_BHWC)))


class Stage(nn.Module):
    """Merging, where there is one, and blocks whose windows are shifted every second time.

    position_window: of swin_v2.Block; None for the first version's blocks.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        downsample: bool,
        position_window: int | None = None,
    ) -> None:
        super().__init__()
        self.window_size = window_size

        def block() -> nn.Module:
            if position_window is None:
                return Block(
                    embed_dim=embed_dim, num_heads=num_heads, window_size=window_size, mlp_ratio=mlp_ratio
                )
            return swin_v2.Block(
                embed_dim=embed_dim,
                num_heads=num_heads,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                position_window=position_window,
            )

        merging = PatchMerging if position_window is None else swin_v2.PatchMerging
        self.downsample = merging(embed_dim=in_dim) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x_BHWC: Tensor, branch_scale_BL2: Tensor | None) -> Tensor:
        x_BHWC = self.downsample(x_BHWC)
        _, H, W, _ = x_BHWC.shape
        w = self.window_size
        # a side that one window covers has nothing to shift to
        shift = (w // 2 if w < H else 0, w // 2 if w < W else 0)
        mask_WTT = None
        if any(shift) and len(self.blocks) > 1:
            mask_WTT = shifted_mask((H, W), w, shift, device=x_BHWC.device, dtype=x_BHWC.dtype)
        for i, block in enumerate(self.blocks):
            scale_B2 = None if branch_scale_BL2 is None else branch_scale_BL2[:, i]
            if i % 2:
                x_BHWC = block(x_BHWC, scale_B2, shift=shift, mask_WTT=mask_WTT)
            else:
                x_BHWC = block(x_BHWC, scale_B2)
        return x_BHWC


class Block(nn.Module):
    """Pre-norm attention inside windows and MLP, each on a residual branch that stochastic depth may scale."""

    def __init__(self, *, embed_dim: int, num_heads: int, window_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = layer_norm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = WindowAttention(embed_dim=embed_dim, num_heads=num_heads, window_size=window_size)
        self.norm2 = layer_norm(embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=mlp_width(embed_dim, mlp_ratio))

    def forward(
        self,
        x_BHWC: Tensor,
        branch_scale_B2: Tensor | None = None,
        *,
        shift: Window = (0, 0),
        mask_WTT: Tensor | None = None,
    ) -> Tensor:
        """The tokens after the block. branch_scale: as layers.Block takes it. mask: of shifted_mask."""
        attended_BHWC = attend_in_windows(
            self.norm1(x_BHWC), self.attn, window_size=self.window_size, shift=shift, mask_WTT=mask_WTT
        )
        x_BHWC = x_BHWC + scaled(attended_BHWC, branch_scale_B2, 0)
        return x_BHWC + scaled(self.mlp(self.norm2(x_BHWC)), branch_scale_B2, 1)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window, with a trained bias for each offset between two tokens.

    `watch`: as swin_parts.attention_of_windows calls it.
    """

    watch: AttentionWatch | None = None
    relative_position_index: Tensor

    def __init__(self, *, embed_dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        offsets = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        # not in the state dict: it follows from the window
        self.register_buffer("relative_position_index", relative_index(window_size), persistent=False)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BWTC: Tensor, mask_WTT: Tensor | None = None) -> Tensor:
        """Windows (B, W, T, C) to the same; mask: (W, T, T), added to the scores of each window."""
        B, W, T, C = x_BWTC.shape
        H = self.num_heads
        qkv = self.qkv(x_BWTC).reshape(B, W, T, 3, H, C // H).permute(3, 0, 1, 4, 2, 5)
        bias_HTT = biases_of_pairs(self.relative_position_bias_table, self.relative_position_index)
        query, key, value = qkv.unbind(0)
        return self.proj(attention_of_windows(query, key, value, bias_HTT, mask_WTT, self.watch))
