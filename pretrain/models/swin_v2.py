"""The blocks and merging of Swin V2 (arXiv:2111.09883), with timm's parameter names. Called by swin.py.

Against the first version: norms stand at the end of residual branches; attention compares directions, at a trained
scale; and the bias of an offset is what a small network makes of it, so that other windows need no other weights.
"""

# B batch, H W rows and columns of tokens, C width, W windows, T tokens of a window, H heads, O offsets

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.drop_path import scaled
from pretrain.models.layers import AttentionWatch, Mlp, layer_norm
from pretrain.models.sizes import mlp_width
from pretrain.models.swin_parts import (
    LAYER_NORM_EPS,
    Window,
    attend_in_windows,
    attention_of_windows,
    biases_of_pairs,
    relative_index,
    two_by_two,
)

POSITION_MLP_WIDTH = 512  # these three as in the authors' code
FIRST_SCALE = 10.0  # of cosines
LARGEST_SCALE = 100.0  # the paper: a temperature of 0.01 at least


class PatchMerging(nn.Module):
    """Tokens (B, H, W, C) two by two to (B, H/2, W/2, 2C), normalised at the end; odd sides are padded with 0."""

    def __init__(self, *, embed_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * embed_dim, 2 * embed_dim, bias=False)
        self.norm = layer_norm(2 * embed_dim, eps=LAYER_NORM_EPS)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(self.reduction(two_by_two(x_BHWC)))


class Block(nn.Module):
    """Attention inside windows and MLP, each normalised at the end of a residual branch that stochastic depth may
    scale. Both norms start at 0, as the authors': a fresh block passes its tokens on.
    """

    def __init__(
        self, *, embed_dim: int, num_heads: int, window_size: int, mlp_ratio: float, position_window: int
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.attn = WindowAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            window_size=window_size,
            position_window=position_window,
        )
        self.norm1 = layer_norm(embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=mlp_width(embed_dim, mlp_ratio))
        self.norm2 = layer_norm(embed_dim, eps=LAYER_NORM_EPS)
        nn.init.zeros_(self.norm1.weight)
        nn.init.zeros_(self.norm2.weight)

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
            x_BHWC, self.attn, window_size=self.window_size, shift=shift, mask_WTT=mask_WTT
        )
        x_BHWC = x_BHWC + scaled(self.norm1(attended_BHWC), branch_scale_B2, 0)
        return x_BHWC + scaled(self.norm2(self.mlp(x_BHWC)), branch_scale_B2, 1)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside each window: a softmax of scaled cosines and of a bias for each offset.

    position_window: tokens a side of the window that offsets are measured by, which is the one it was trained with.
    `watch`: as swin_parts.attention_of_windows calls it.
    """

    watch: AttentionWatch | None = None
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, *, embed_dim: int, num_heads: int, window_size: int, position_window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(FIRST_SCALE)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, POSITION_MLP_WIDTH),
            nn.ReLU(),
            nn.Linear(POSITION_MLP_WIDTH, num_heads, bias=False),
        )
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        # keys have no bias, as the authors'
        self.q_bias = nn.Parameter(torch.zeros(embed_dim))
        self.v_bias = nn.Parameter(torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        # not in the state dict: they follow from the windows
        coordinates = offset_coordinates(window_size, position_window)
        self.register_buffer("relative_coords_table", coordinates, persistent=False)
        self.register_buffer("relative_position_index", relative_index(window_size), persistent=False)

    def forward(self, x_BWTC: Tensor, mask_WTT: Tensor | None = None) -> Tensor:
        """Windows (B, W, T, C) to the same; mask: (W, T, T), added to the scores of each window."""
        B, W, T, C = x_BWTC.shape
        H, K = self.num_heads, C // self.num_heads
        # added to the product: the weight of `qkv` is read in its own forward alone
        bias_3C = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = (self.qkv(x_BWTC) + bias_3C).reshape(B, W, T, 3, H, K).permute(3, 0, 1, 4, 2, 5)
        query, key, value = qkv.unbind(0)
        # float32: at a scale of 100 a norm that is rounded to bf16 moves scores by a fifth
        scale_H11 = self.logit_scale.float().clamp(max=math.log(LARGEST_SCALE)).exp()
        # √K, for attention() divides by it
        query = F.normalize(query.float(), dim=-1) * (scale_H11 * math.sqrt(K))
        key = F.normalize(key.float(), dim=-1)
        x = attention_of_windows(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            biases_of_pairs(self._bias_table(x_BWTC.dtype), self.relative_position_index),
            mask_WTT,
            self.watch,
        )
        return self.proj(x)

    def _bias_table(self, dtype: torch.dtype) -> Tensor:
        """The bias of each offset, float32 (O, H), within ±8."""
        table_OH = self.cpb_mlp(self.relative_coords_table.to(dtype)).float()
        # 16 · sigmoid of the authors', less 8, which no softmax sees: bf16 has small differences around 0 that it has
        # not around 8, where all biases begin
        return 16.0 * table_OH.sigmoid() - 8.0


def offset_coordinates(window_size: int, position_window: int) -> Tensor:
    """What the network of biases is told of each offset between two tokens of a window, float32 (O, 2): rows and
    columns, 8 times their share of a `position_window`, on a signed logarithmic scale (to the base 8).
    """
    offset = torch.arange(1 - window_size, window_size, dtype=torch.float32)
    # of a window of one token there is no other offset than 0
    far = 8.0 * offset / max(position_window - 1, 1)
    place = far.sign() * torch.log2(far.abs() + 1.0) / math.log2(8.0)
    return torch.stack(torch.meshgrid(place, place, indexing="ij"), dim=-1).flatten(0, 1)
