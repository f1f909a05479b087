"""What transformer blocks cost: work, weights, and what they keep for the backward. Called by flops.py and
pyramids.py; no torch.

One multiply-add is two FLOPs; only matrix products and convolutions count. The blocks are those of models/: pre-norm,
attention and MLP on residual branches (post-norm for Swin V2, which has and keeps as much).
"""

# N tokens, Q queries, T tokens that keys and values are made of, D width, M hidden width of the MLP, H heads

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

FLOAT32_BYTES = 4
LAYER_NORM_STATISTICS_BYTES = 8  # a token: mean and deviation, float32
POSITION_MLP_WIDTH = 512  # of the network that makes Swin V2's biases of two coordinates


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """`depth` equal blocks on one image's tokens.

    gated: SwiGLU, whose first layer is 2 · hidden_dim wide. computed: the share of residual branches that is
    computed (batch-subset stochastic depth). window_side: attention within windows, with a table of relative positions;
    num_queries: tokens with the padding to whole windows. cosine: Swin V2's, of normalised queries and keys, of which
    keys have no bias, with a trained scale a head; a small network, whose work is done once a batch and left out,
    stands for the table. sr_ratio: keys and values of tokens that a strided convolution has shrunk by it on each side.
    depthwise: a 3 x 3 convolution inside the MLP.
    """

    depth: int
    num_tokens: int
    embed_dim: int
    hidden_dim: int
    num_heads: int = 1
    gated: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    computed: float = 1.0
    num_queries: int | None = None  # num_tokens
    num_key_tokens: int | None = None  # num_queries
    keys_a_query: int | None = None  # num_key_tokens
    window_side: int | None = None
    cosine: bool = False
    sr_ratio: int = 1
    depthwise: bool = False

    @property
    def _queries(self) -> int:
        return self.num_tokens if self.num_queries is None else self.num_queries

    @property
    def _key_tokens(self) -> int:
        return self._queries if self.num_key_tokens is None else self.num_key_tokens

    @property
    def _keys(self) -> int:
        return self._key_tokens if self.keys_a_query is None else self.keys_a_query

    def flops(self) -> float:
        """Of one forward of one image."""
        N, Q, T, D, M = self.num_tokens, self._queries, self._key_tokens, self.embed_dim, self.hidden_dim
        attention = 4.0 * Q * D * D + 4.0 * T * D * D  # query and output, key and value
        attention += 4.0 * Q * self._keys * D  # scores, and their product with the values
        if self.sr_ratio > 1:
            attention += 2.0 * T * D * D * self.sr_ratio**2
        mlp = 2.0 * N * D * M * (3 if self.gated else 2) + (18.0 * N * M if self.depthwise else 0.0)
        return self.depth * self.computed * (attention + mlp)

    def parameters(self) -> int:
        D, M, H = self.embed_dim, self.hidden_dim, self.num_heads
        total = 4 * D + linear(D, 3 * D) + linear(D, D)  # 4 D: two norms
        total += linear(D, 2 * M if self.gated else M) + linear(M, D)
        if self.qk_norm:
            total += 4 * (D // H)
        if self.layer_scale:
            total += 2 * D
        if self.cosine:
            total += linear(2, POSITION_MLP_WIDTH) + linear(POSITION_MLP_WIDTH, H, bias=False) + H - D
        elif self.window_side is not None:
            total += (2 * self.window_side - 1) ** 2 * H
        if self.sr_ratio > 1:
            total += linear(D * self.sr_ratio**2, D) + 2 * D
        if self.depthwise:
            total += 10 * M
        return self.depth * total

    def kept_values(self, *, fused_attention: bool = True) -> float:
        """Values that one block keeps for the backward, of one image: a model, see `kept_bytes`."""
        N, Q, T, D, M = self.num_tokens, self._queries, self._key_tokens, self.embed_dim, self.hidden_dim
        values = 2.0 * N * D  # the residual stream before each norm
        values += Q * D + N * D  # what the norms give
        values += Q * D + 2 * T * D + Q * D  # query, key, value; the attention's output
        if not fused_attention:  # each score's probability
            values += float(Q) * self._keys * self.num_heads
        # query, key and value in one piece, two of which the norms need, beside what they give
        if self.qk_norm or self.cosine:
            values += Q * D + 2 * T * D
        if self.cosine:  # the query before it is scaled, which the scale's gradient needs
            values += Q * D
        if self.layer_scale:
            values += 2 * N * D
        if self.sr_ratio > 1:
            values += 2 * T * D
        return values + N * M * (4 if self.gated else 3 if self.depthwise else 2)

    def kept_bytes(self, *, value_bytes: int, fused_attention: bool = True) -> float:
        """What all blocks keep for the backward, of one image.

        What autograd saves, by reading what each operation needs for its backward: allocators round up, a
        compiler recomputes some of it, neither is here.
        """
        values = self.kept_values(fused_attention=fused_attention) * value_bytes
        statistics = 2 * LAYER_NORM_STATISTICS_BYTES * self.num_tokens
        if self.qk_norm:
            statistics += LAYER_NORM_STATISTICS_BYTES * (self._queries + self._key_tokens) * self.num_heads
        if self.sr_ratio > 1:
            statistics += LAYER_NORM_STATISTICS_BYTES * self._key_tokens
        if fused_attention:
            statistics += 4 * self._queries * self.num_heads  # the softmax's normaliser
        return self.depth * self.computed * (values + statistics)

    def input_bytes(self, *, value_bytes: int) -> float:
        """What is kept of one image when blocks are computed again in the backward: each one's input."""
        return float(self.depth) * self.num_tokens * self.embed_dim * value_bytes


@dataclass(frozen=True, kw_only=True)
class Network:
    """Blocks, and all that is not in them. `out_dim`: width of the features; `out_tokens`: of the last map's tokens.

    other_kept_float32: values kept in float32 whatever the activations are, as losses are computed.
    """

    blocks: Sequence[Blocks]
    other_flops: float
    other_parameters: int
    other_kept_values: float
    out_dim: int
    out_tokens: int
    other_kept_float32: float = 0.0
    more: Sequence[Network] = field(default=())  # a decoder, a head

    def flops(self) -> float:
        """Of one forward of one image."""
        own = self.other_flops + sum(blocks.flops() for blocks in self.blocks)
        return own + sum(network.flops() for network in self.more)

    def parameters(self) -> int:
        """Trained ones, without those of `more`."""
        return self.other_parameters + sum(blocks.parameters() for blocks in self.blocks)

    def kept_bytes(
        self, *, value_bytes: int, recompute_blocks: bool = False, fused_attention: bool = True
    ) -> float:
        """What the backward needs of one image's forward: a model. recompute_blocks: of blocks only their inputs are
        kept, and one block whole while its backward runs.
        """
        total = self.other_kept_values * value_bytes + self.other_kept_float32 * FLOAT32_BYTES
        whole = [
            one.kept_bytes(value_bytes=value_bytes, fused_attention=fused_attention) for one in self.blocks
        ]
        if recompute_blocks:
            total += sum(one.input_bytes(value_bytes=value_bytes) for one in self.blocks)
            total += max(
                (kept / one.depth for kept, one in zip(whole, self.blocks, strict=True)), default=0.0
            )
        else:
            total += sum(whole)
        return total + sum(
            network.kept_bytes(
                value_bytes=value_bytes, recompute_blocks=recompute_blocks, fused_attention=fused_attention
            )
            for network in self.more
        )


def linear(inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Weights of a linear layer, or of a convolution with inputs = channels x kernel."""
    return inputs * outputs + (outputs if bias else 0)
