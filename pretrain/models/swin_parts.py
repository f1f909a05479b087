"""What both versions of Swin are made of: windows, their shifts and masks, and the merging of neighbours.

Called by swin.py and swin_v2.py. It has no weights of its own.
"""

# B batch, H W rows and columns of tokens, C width, h w those of a window, T = h·w; in scores H heads and W windows

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.layers import AttentionWatch, attention

LAYER_NORM_EPS = 1e-5  # Swin's own, timm's and transformers'
OUTSIDE = -100.0  # added to scores of tokens that a shifted window brings together from two ends of the image

Window = tuple[int, int]


def attend_in_windows(
    x_BHWC: Tensor,
    attend: Callable[[Tensor, Tensor | None], Tensor],
    *,
    window_size: int,
    shift: Window,
    mask_WTT: Tensor | None,
) -> Tensor:
    """What `attend`, of windows (B, W, T, C) and a mask, gives for tokens (B, H, W, C). mask: of shifted_mask."""
    _, H, W, _ = x_BHWC.shape
    w = window_size
    # padded tokens are zeros that attention sees; before the shift, as in the authors' detection code and
    # transformers (timm shifts first, and its mask then misses some of what came round)
    if H % w or W % w:
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, -W % w, 0, -H % w))
    padded = (x_BHWC.shape[1], x_BHWC.shape[2])
    if any(shift):
        x_BHWC = x_BHWC.roll((-shift[0], -shift[1]), dims=(1, 2))
    x_BHWC = join_windows(attend(split_windows(x_BHWC, w), mask_WTT), w, padded)
    if any(shift):
        x_BHWC = x_BHWC.roll(shift, dims=(1, 2))
    return x_BHWC[:, :H, :W]


def attention_of_windows(
    query_BWHTK: Tensor,
    key_BWHTK: Tensor,
    value_BWHTK: Tensor,
    bias_HTT: Tensor,
    mask_WTT: Tensor | None,
    watch: AttentionWatch | None,
) -> Tensor:
    """layers.attention of each window's tokens, (B, W, T, C); the bias and mask are added to its scores.

    watch: as of layers.Attention; windows are in its batch axis, or before the heads in theirs.
    """
    B, W, H, T, K = query_BWHTK.shape
    # windows and heads in one axis where there is a mask: then one bias serves all of the batch
    joined = (0, 1) if mask_WTT is None else (1, 2)
    query, key, value = (part.flatten(*joined) for part in (query_BWHTK, key_BWHTK, value_BWHTK))
    bias = bias_HTT.to(value.dtype)
    if mask_WTT is not None:
        bias = (bias + mask_WTT.to(value.dtype)[:, None]).flatten(0, 1)
    if watch is not None:
        watch(query, key, bias[None])
    x = attention(query, key, value, bias[None]).reshape(B, W, H, T, K)
    return x.transpose(2, 3).reshape(B, W, T, H * K)


def relative_index(window_size: int) -> Tensor:
    """The number of the offset between each pair of a window's tokens, int64 (T, T), of (2w - 1)² offsets."""
    place = torch.arange(window_size)
    row_T, column_T = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    down = row_T[:, None] - row_T[None, :] + window_size - 1
    right = column_T[:, None] - column_T[None, :] + window_size - 1
    return down * (2 * window_size - 1) + right


def biases_of_pairs(table_OH: Tensor, index_TT: Tensor) -> Tensor:
    """A bias for each offset and head to one for each pair of a window's tokens, (H, T, T)."""
    T = len(index_TT)
    return table_OH[index_TT.flatten()].reshape(T, T, -1).permute(2, 0, 1)


def shifted_mask(
    grid: tuple[int, int], window_size: int, shift: Window, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(W, T, T): 0 between tokens that were neighbours before the shift, OUTSIDE between others."""
    regions = []
    for side, step in zip(grid, shift, strict=True):
        padded = side + -side % window_size
        place = torch.arange(padded, device=device)
        # the last window holds what came round from the other end
        region = (place >= padded - window_size).long() + (place >= padded - step).long()
        regions.append(region if step else torch.zeros_like(region))
    region_HW = regions[0][:, None] * 3 + regions[1][None, :]
    region_WT = split_windows(region_HW[None, :, :, None], window_size)[0, :, :, 0]
    apart = region_WT[:, :, None] != region_WT[:, None, :]
    return torch.where(apart, OUTSIDE, 0.0).to(dtype)


def split_windows(x_BHWC: Tensor, window_size: int) -> Tensor:
    """(B, H, W, C) to (B, W, T, C), row by row; H and W are multiples of the window."""
    B, H, W, C = x_BHWC.shape
    w = window_size
    x = x_BHWC.reshape(B, H // w, w, W // w, w, C).transpose(2, 3)
    return x.reshape(B, (H // w) * (W // w), w * w, C)


def join_windows(x_BWTC: Tensor, window_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of split_windows, for a grid of (H, W) tokens."""
    B, _, _, C = x_BWTC.shape
    (H, W), w = grid, window_size
    x = x_BWTC.reshape(B, H // w, W // w, w, w, C).transpose(2, 3)
    return x.reshape(B, H, W, C)


def two_by_two(x_BHWC: Tensor) -> Tensor:
    """Tokens beside their neighbours, (B, H/2, W/2, 4C); odd sides are padded with 0."""
    B, H, W, C = x_BHWC.shape
    if H % 2 or W % 2:
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, W % 2, 0, H % 2))
    x = x_BHWC.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C)
    # column before row inside the four, as the authors concatenated them
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)
