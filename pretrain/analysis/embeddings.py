"""What the first layer of a network knows: places and filters. Called by figures.py.

Both are figures of the ViT paper (arXiv:2010.11929, figure 7): how similar the position embeddings of two patches
are, and the principal components of the filters that embed a patch.
"""

# D width, G patches a side, P prefix tokens, C channels, p a patch's side in pixels, F filters

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.backbone import Backbone
from pretrain.models.vit import VisionTransformer

NUM_FILTERS = 28  # as many as the paper shows


@dataclass(frozen=True, kw_only=True)
class PrincipalFilters:
    """filters: float32 (F, C, p, p), of length 1, the largest variance first; the entry that is furthest from 0 is
    positive. shares: float32 (F,), of the variance over all filters, which all F of them need not make up."""

    filters: Tensor
    shares: Tensor


def position_similarity(pos_embed: Tensor, num_prefix_tokens: int) -> Tensor:
    """Cosines between the position embeddings of any two patches: float32 (G, G, G, G), rows before columns.

    pos_embed: (1, P+G², D); prefix tokens are left out.
    """
    patches = F.normalize(pos_embed[0, num_prefix_tokens:].to(torch.float64), dim=-1)
    G = math.isqrt(len(patches))
    assert len(patches) == G * G, f"position embeddings of {len(patches)} patches are no square grid"
    return (patches @ patches.T).to(torch.float32).reshape(G, G, G, G)


def principal_filters(weight: Tensor, *, count: int = NUM_FILTERS) -> PrincipalFilters:
    """The principal components of the D filters in a patch embedding's weight (D, C, p, p), at most `count`.

    The mean filter is taken off, as principal components have it. There are no more than C·p² or D - 1. Not numbers
    for a weight that is not finite.
    """
    D = len(weight)
    flat = weight.to(torch.float64).flatten(1)
    kept = min(count, flat.shape[1], max(D - 1, 1))
    if not torch.isfinite(flat).all():  # which have none, and would not let the decomposition end
        nothing = torch.full((kept, *weight.shape[1:]), torch.nan)
        return PrincipalFilters(filters=nothing, shares=nothing[:, 0, 0, 0])
    _, lengths, components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False)
    components, variances = components[:kept], lengths**2
    furthest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    filters = (components * torch.where(furthest < 0, -1.0, 1.0)).to(torch.float32)
    total = variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares = (variances[:kept] / total).to(torch.float32)
    return PrincipalFilters(filters=filters.reshape(kept, *weight.shape[1:]), shares=shares)


@torch.no_grad()
def read_embeddings(
    backbone: Backbone,
    device: torch.device,
    *,
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor | None, Tensor]:
    """Position embeddings (1, P+N, D), where there are any, and the weight of the patch embedding, float32 on the host.

    They are read as one forward begins, of a black image, which is when ZeRO-3 has all of them on every rank; all
    ranks together. reading: the context of that forward (`Engine.reading`).
    """
    read: dict[str, Tensor] = {}

    def keep(owner: nn.Module, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any) -> None:
            read[name] = getattr(module, name).detach().to("cpu", torch.float32, copy=True)

        return owner.register_forward_pre_hook(hook)  # after the one that gathers

    hooks = [keep(backbone.patch_embed.proj, "weight")]
    if isinstance(backbone, VisionTransformer) and backbone.pos_embed is not None:
        hooks.append(keep(backbone, "pos_embed"))
    was_training = backbone.training
    backbone.eval()
    try:
        with reading():
            backbone.features(torch.zeros(1, 3, backbone.image_size, backbone.image_size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
        backbone.train(was_training)
    return read.get("pos_embed"), read["weight"]
