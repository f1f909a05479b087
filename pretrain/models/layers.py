"""The parts of a transformer encoder, named as in timm. Used by the backbones and the MAE decoder.

Every parameter is read inside the forward of the module that owns it: ZeRO-3 gathers weights there.
"""

# B batch, N tokens, D width, H heads, K head width

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.drop_path import scaled
from pretrain.models.rotary import rotate
from pretrain.models.sizes import mlp_width, swiglu_width

LAYER_NORM_EPS = 1e-6  # timm's and MAE's; Hugging Face's default is 1e-12

# Given queries and keys (B, H, N, K) and the bias of the scores, if there is one, as they enter `attention`.
AttentionWatch = Callable[[Tensor, Tensor, Tensor | None], None]


def layer_norm(embed_dim: int, *, eps: float = LAYER_NORM_EPS) -> nn.LayerNorm:
    """LayerNorm over the last axis; torch takes its statistics in float32 for bf16 inputs as well."""
    return nn.LayerNorm(embed_dim, eps=eps)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √K + bias) v for (B, H, N, K), as two products; bias broadcasts to (B, H, N, N)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1) @ value


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √K + bias) v for (B, H, N, K), by the way that is fast on the tensors' device."""
    if query.device.type == "cpu":
        # torch's fused attention trains small ViTs at half the speed of the plain product on CPUs
        return plain_attention(query, key, value, bias)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class PatchProjection(nn.Module):
    """A convolution (B, C, H, W) to (B, D, h, w), in the weight's dtype; its stride is its kernel if not given."""

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        channels: int = 3,
        stride: int | None = None,
        padding: int = 0,
    ) -> None:
        super().__init__()
        fan_in = channels * patch_size * patch_size
        self.weight = nn.Parameter(torch.empty(embed_dim, channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(embed_dim))
        self.stride = stride or patch_size
        self.padding = padding
        # LeCun's normal as in jax: cutting at 2σ shrinks the standard deviation by 0.8796
        std = fan_in**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # images stay float32 up to here, because objectives take their targets from them
        x_BCHW = images_BCHW.to(self.weight.dtype)
        return F.conv2d(x_BCHW, self.weight, self.bias, stride=self.stride, padding=self.padding)


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to patch tokens (B, N, D), row by row."""

    def __init__(self, *, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size=patch_size, embed_dim=embed_dim)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with query, key and value fused in one product.

    With qk_norm each head's queries and keys are normalised (arXiv:2302.05442), before rotary positions turn them.
    `watch`, where somebody has set it, is shown what is attended to what; analysis/attention.py does.
    """

    watch: AttentionWatch | None = None

    def __init__(self, *, embed_dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.q_norm = layer_norm(embed_dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = layer_norm(embed_dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x_BND: Tensor, rope: Tensor | None = None) -> Tensor:
        """rope: sines and cosines of rotary.py, (2, N, K) or (2, B, N, K)."""
        B, N, D = x_BND.shape
        qkv = self.qkv(x_BND).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = rotate(query, rope), rotate(key, rope)
        if self.watch is not None:
            self.watch(query, key, None)
        return self.proj(attention(query, key, value).transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class SwiGLU(nn.Module):
    """silu(gate) · value between two layers (arXiv:2002.05202); fc1 holds gate, then value, as timm's SwiGLUPacked."""

    def __init__(self, *, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 2 * hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x_BND: Tensor) -> Tensor:
        gate, value = self.fc1(x_BND).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A trained factor a channel on a residual branch, small at first (CaiT, arXiv:2103.17239)."""

    def __init__(self, embed_dim: int, *, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), initial))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class AttentionPool(nn.Module):
    """Tokens (B, N, D) to one vector (B, D): a trained query looks at them, an MLP follows (arXiv:2106.04560).

    Named as timm's AttentionPoolLatent.
    """

    def __init__(self, *, embed_dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.q = nn.Linear(embed_dim, embed_dim)
        self.kv = nn.Linear(embed_dim, 2 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm = layer_norm(embed_dim)
        self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=hidden_dim)
        nn.init.trunc_normal_(self.latent, std=embed_dim**-0.5)

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        H, K = self.num_heads, D // self.num_heads
        query = self.q(self.latent.expand(B, -1, -1)).reshape(B, 1, H, K).transpose(1, 2)
        key, value = self.kv(x_BND).reshape(B, N, 2, H, K).permute(2, 0, 3, 1, 4).unbind(0)
        pooled_B1D = self.proj(attention(query, key, value).transpose(1, 2).reshape(B, 1, D))
        return (pooled_B1D + self.mlp(self.norm(pooled_B1D)))[:, 0]


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch that stochastic depth may scale or leave out.

    mlp "swiglu" is two thirds as wide as "gelu", so that it has as many weights (see sizes.swiglu_width).
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        qk_norm: bool = False,
        layer_scale_init: float | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = mlp_width(embed_dim, mlp_ratio)

        def layer_scale() -> nn.Module:
            return (
                nn.Identity() if layer_scale_init is None else LayerScale(embed_dim, initial=layer_scale_init)
            )

        self.norm1 = layer_norm(embed_dim)
        self.attn = Attention(embed_dim=embed_dim, num_heads=num_heads, qk_norm=qk_norm)
        self.ls1 = layer_scale()
        self.norm2 = layer_norm(embed_dim)
        self.mlp: Mlp | SwiGLU
        if mlp == "swiglu":
            self.mlp = SwiGLU(embed_dim=embed_dim, hidden_dim=swiglu_width(hidden_dim))
        else:
            self.mlp = Mlp(embed_dim=embed_dim, hidden_dim=hidden_dim)
        self.ls2 = layer_scale()

    def forward(
        self,
        x_BND: Tensor,
        branch_scale_B2: Tensor | None = None,
        *,
        rope: Tensor | None = None,
        kept_2S: Tensor | None = None,
    ) -> Tensor:
        """The tokens after the block, (B, N, D).

        branch_scale: (B, 2), for the attention and the MLP branch of each sample, 0 where the branch is dropped and
        1 / (1 - rate) where it is kept; None keeps every branch as it is. kept: int64 (2, S), in place of that, the
        samples for which the branches are computed at all. rope: as Attention takes it.
        """
        if kept_2S is not None:
            attended, fed = kept_2S.unbind(0)
            some_rope = rope[:, attended] if rope is not None and rope.ndim == 4 else rope
            x_BND = _add_to(x_BND, attended, self._attend(x_BND[attended], some_rope))
            return _add_to(x_BND, fed, self._feed(x_BND[fed]))
        x_BND = x_BND + scaled(self._attend(x_BND, rope), branch_scale_B2, 0)
        return x_BND + scaled(self._feed(x_BND), branch_scale_B2, 1)

    def _attend(self, x_BND: Tensor, rope: Tensor | None) -> Tensor:
        return self.ls1(self.attn(self.norm1(x_BND), rope))

    def _feed(self, x_BND: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x_BND)))


def _add_to(x_BND: Tensor, kept_S: Tensor, branch_SND: Tensor) -> Tensor:
    """x with the branch added to the kept samples, scaled up for those that were left out."""
    return x_BND.index_add(0, kept_S, branch_SND.to(x_BND.dtype), alpha=len(x_BND) / len(kept_S))


def replace_masked(x_BND: Tensor, mask_BN: Tensor | None, mask_token: Tensor | None) -> Tensor:
    """x with `mask_token` (1, 1, D) in place of the tokens where mask, bool (B, N), is true; x itself without one."""
    if mask_BN is None:
        return x_BND
    assert mask_token is not None, "a mask needs a mask token"
    return torch.where(mask_BN[:, :, None], mask_token.to(x_BND.dtype), x_BND)


def init_linears_truncated_normal(module: nn.Module) -> None:
    """Weights of every nn.Linear below `module` from a normal with σ = 0.02, biases 0, as timm does."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
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
