"""How far each head of a network looks: mean attention distances over images. Called by figures.py.

A token's attention distance is the mean distance, in pixels, between its place and the places that it attends to,
weighted by attention; a head's is the mean of that over tokens and images (ViT, arXiv:2010.11929, figure 7 and
appendix D.7). A token stands at the centre of its patch. Class token and registers have no place: as queries they
are left out, and as keys too, with the rest weighted as if they were not there; what they draw is told apart.
"""

# B images, H heads, N query tokens and M key tokens with a place, P prefix tokens, K head width

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed import sum_over_ranks
from pretrain.models.backbone import Backbone
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer

_AT_ONCE = 1 << 24  # attention weights


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One attention of a network, and where its tokens stand.

    stride: pixels between the centres of neighbouring queries; key_stride: of keys. window: a side of the square of
    tokens within which attention stays, None where it does not. num_prefix_tokens: before both queries and keys.
    """

    attention: Any
    num_heads: int
    stride: int
    key_stride: int
    window: int | None
    num_prefix_tokens: int

    def distances(self, image_size: tuple[int, int], device: torch.device) -> Tensor:
        """Pixels between each query and each key, float32 (N, M), for images of (height, width)."""
        if self.window is not None:
            queries = keys = (self.window, self.window)
        else:
            queries = (math.ceil(image_size[0] / self.stride), math.ceil(image_size[1] / self.stride))
            ratio = self.key_stride // self.stride
            keys = (queries[0] // ratio, queries[1] // ratio)
        return torch.cdist(
            centres(queries, self.stride, device),
            centres(keys, self.key_stride, device),
            compute_mode="donot_use_mm_for_euclid_dist",  # which would lose digits
        )


def centres(grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Where tokens of a grid stand, row by row: pixels down and across, float32 (N, 2)."""
    axes = ((torch.arange(side, device=device, dtype=torch.float32) + 0.5) * stride for side in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def attention_layers(backbone: Backbone) -> list[AttentionLayer]:
    """The self-attentions of a network, from its input on."""
    if isinstance(backbone, SwinTransformer | PyramidVisionTransformer):
        layers = []
        stages: Any = backbone.layers if isinstance(backbone, SwinTransformer) else backbone.stages
        for i, stage in enumerate(stages):
            stride = backbone.strides[i]
            ratio = 1 if isinstance(backbone, SwinTransformer) else backbone.sr_ratios[i]
            window = stage.window_size if isinstance(backbone, SwinTransformer) else None
            layers += [
                AttentionLayer(
                    attention=block.attn,
                    num_heads=backbone.num_heads[i],
                    stride=stride,
                    key_stride=stride * ratio,
                    window=window,
                    num_prefix_tokens=0,
                )
                for block in stage.blocks
            ]
        return layers
    return [
        AttentionLayer(
            attention=block.attn,
            num_heads=backbone.num_heads[0],
            stride=backbone.patch_size,
            key_stride=backbone.patch_size,
            window=None,
            num_prefix_tokens=backbone.num_prefix_tokens,
        )
        for block in backbone.blocks
    ]


@dataclass(frozen=True, kw_only=True)
class HeadDistance:
    """One head's, over images. layer and head count from 0; distances in pixels.

    mean, deviation: of the images' mean attention distances. prefix_share: of the attention of patches, what goes to
    class token and registers. uniform: the distance of a head that attends alike to all that it can see (of a Swin, a
    whole window).
    """

    layer: int
    head: int
    mean: float
    deviation: float
    prefix_share: float
    uniform: float


class AttentionDistances:
    """Sums over images, to which `add` adds; `over_ranks` makes distances of them."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        """The backbone must be on `device`."""
        self._backbone, self._device = backbone, device
        self._layers = attention_layers(backbone)
        # distance, its square and the prefix's share, by layer: float64 (H, 3)
        self._sums = [
            torch.zeros(layer.num_heads, 3, dtype=torch.float64, device=device) for layer in self._layers
        ]
        self._distances: dict[int, Tensor] = {}  # by layer, one size of images is looked at
        self._uniform = [0.0] * len(self._layers)
        self._count = torch.zeros(1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        images_BCHW: Tensor,
        weights_B: Tensor,
        *,
        reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Normalised images on the device, all of one size; those of weight 0 are left out. reading: the context of a
        forward (`Engine.reading`). The backbone runs in evaluation mode, and is put back into the mode it was in."""
        real_B = (weights_B > 0).to(self._device)
        size = (images_BCHW.shape[2], images_BCHW.shape[3])
        was_training = self._backbone.training
        self._backbone.eval()
        try:
            with _watching(self._backbone, self._layers, partial(self._see, real_B, size)), reading():
                self._backbone.features(images_BCHW)
        finally:
            self._backbone.train(was_training)
        self._count += real_B.sum()

    def _see(
        self,
        real_B: Tensor,
        image_size: tuple[int, int],
        number: int,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
    ) -> None:
        layer, B = self._layers[number], len(real_B)
        if number not in self._distances:
            self._distances[number] = layer.distances(image_size, query.device)
            self._uniform[number] = float(self._distances[number].mean())
        distance_NM = self._distances[number]
        seen = distances_and_shares(query, key, bias, distance_NM, layer.num_prefix_tokens)
        # Windows are in the batch axis or before the heads: in both cases heads come last.
        seen_BH2 = seen.to(torch.float64).reshape(B, -1, layer.num_heads, 2).mean(dim=1)[real_B]
        distance_BH = seen_BH2[..., 0]
        self._sums[number] += torch.stack([distance_BH, distance_BH**2, seen_BH2[..., 1]], dim=-1).sum(dim=0)

    def over_ranks(self) -> tuple[list[HeadDistance], int]:
        """All heads, layer by layer, and the number of images, on every rank; all ranks together.

        Not a number where there were no images.
        """
        flat = torch.cat([self._count, *(sums.flatten() for sums in self._sums)])
        count, *values = sum_over_ranks(flat).tolist()
        found: list[HeadDistance] = []
        for number, layer in enumerate(self._layers):
            for head in range(layer.num_heads):
                place = 3 * len(found)
                total = values[place : place + 3]
                mean, square, share = (value / count if count else math.nan for value in total)
                found.append(
                    HeadDistance(
                        layer=number,
                        head=head,
                        mean=mean,
                        deviation=math.sqrt(max(0.0, square - mean * mean)) if count else math.nan,
                        prefix_share=share,
                        uniform=self._uniform[number],
                    )
                )
        return found, int(count)


def distances_and_shares(
    query: Tensor, key: Tensor, bias: Tensor | None, distance_NM: Tensor, num_prefix_tokens: int
) -> Tensor:
    """Mean attention distance of each row and head, and the prefix tokens' share: float32 (B, H, 2).

    query (B, H, P+N, K), key (B, H, P+M, K), and bias, which broadcasts to (B, H, P+N, P+M), as attention() takes
    them; distance (N, M) in pixels. Computed in float32.
    """
    P = num_prefix_tokens
    B, H, N, _ = query.shape
    step = max(1, _AT_ONCE // (H * N * key.shape[2]))
    parts = []
    for start in range(0, B, step):
        some_query, some_key = (x[start : start + step].to(torch.float32) for x in (query, key))
        scores = (some_query * query.shape[-1] ** -0.5) @ some_key.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias.to(torch.float32)
        weights = scores.softmax(dim=-1)[:, :, P:]
        share = weights[..., :P].sum(dim=-1).mean(dim=-1)
        # anew over the keys that have a place: a share of them by division could be 0 / 0
        of_patches = scores[:, :, P:, P:].softmax(dim=-1)
        distance = (of_patches * distance_NM).sum(dim=-1).mean(dim=-1)
        parts.append(torch.stack([distance, share], dim=-1))
    return torch.cat(parts)


@contextmanager
def _watching(
    backbone: Backbone,
    layers: list[AttentionLayer],
    seen: Callable[[int, Tensor, Tensor, Tensor | None], None],
) -> Iterator[None]:
    """Within it, `seen(number, query, key, bias)` is told of each layer's attention."""
    with ExitStack() as stack:
        if _is_compiled(backbone):  # what was compiled without a watcher may not look for one
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for number, layer in enumerate(layers):
                layer.attention.watch = partial(seen, number)
            yield
        finally:
            for layer in layers:
                layer.attention.watch = None


def _is_compiled(module: nn.Module) -> bool:
    return any(part._compiled_call_impl is not None for part in module.modules())
