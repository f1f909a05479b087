"""The parts of a transformer encoder, named as in timm. Used by vit.py and the MAE decoder.

Every parameter is read inside the forward of the module that owns it: ZeRO-3 gathers weights there.
"""

# B batch, N tokens, D width, H heads, K head width

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.sizes import mlp_width

LAYER_NORM_EPS = 1e-6  # timm's and MAE's; Hugging Face's default is 1e-12


def layer_norm(embed_dim: int) -> nn.LayerNorm:
    """LayerNorm over the last axis; torch takes its statistics in float32 for bf16 inputs as well."""
    return nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v for (B, H, N, K), as two products."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v for (B, H, N, K), by the way that is fast on the tensors' device."""
    if query.device.type == "cpu":
        # torch's fused attention trains small ViTs at half the speed of the plain product on CPUs
        return plain_attention(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel: (B, 3, S, S) to (B, D, G, G), in the weight's dtype."""

    def __init__(self, *, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(embed_dim))
        self.stride = patch_size
        # LeCun's normal as in jax: cutting at 2σ shrinks the standard deviation by 0.8796
        std = (3 * patch_size * patch_size) ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # images stay float32 up to here, because objectives take their targets from them
        return F.conv2d(images_BCHW.to(self.weight.dtype), self.weight, self.bias, stride=self.stride)


class PatchEmbed(nn.Module):
    """Images (B, 3, S, S) to patch tokens (B, N, D), row by row."""

    def __init__(self, *, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size=patch_size, embed_dim=embed_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with query, key and value fused in one product."""

    def __init__(self, *, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(query, key, value).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch that stochastic depth may scale.

    `branch_scale_B2` (B, 2) holds, for the attention and the MLP branch of each sample, 0 where the
    branch is dropped and 1 / (1 - rate) where it is kept; None keeps every branch as it is.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(embed_dim)
        self.attn = Attention(embed_dim=embed_dim, num_heads=num_heads)
        self.norm2 = layer_norm(embed_dim)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=mlp_width(embed_dim, mlp_ratio))

    def forward(self, x_BND: Tensor, branch_scale_B2: Tensor | None = None) -> Tensor:
        branch_BND = self.attn(self.norm1(x_BND))
        if branch_scale_B2 is not None:
            branch_BND = branch_BND * branch_scale_B2[:, 0, None, None]
        x_BND = x_BND + branch_BND
        branch_BND = self.mlp(self.norm2(x_BND))
        if branch_scale_B2 is not None:
            branch_BND = branch_BND * branch_scale_B2[:, 1, None, None]
        return x_BND + branch_BND


def init_linears_truncated_normal(module: nn.Module) -> None:
    """Weights of every nn.Linear below `module` from a normal with σ = 0.02, biases 0, as timm does."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


def init_linears_xavier(module: nn.Module) -> None:
    """Weights of every nn.Linear below `module` by Xavier's uniform rule, biases 0, as MAE does."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PatchProjection):
            # as if it were a linear layer on flattened patches
            D, C, height, width = part.weight.shape
            bound = math.sqrt(6.0 / (D + C * height * width))
            nn.init.uniform_(part.weight, -bound, bound)
