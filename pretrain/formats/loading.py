"""Put a backbone that was read (incoming.py) into a model, and account for every tensor.

Called by train.py for `init_from:`, and by evaluate and export. A model is only touched once all of
it is known to fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError
from pretrain.formats.incoming import Incoming
from pretrain.formats.naming import final_norm, listed
from pretrain.models.build import build_backbone
from pretrain.models.layers import Block
from pretrain.models.pos_embed import resample_pos_embed, sincos_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.models.vit import VisionTransformer

NUM_PREFIX_TOKENS = 1  # the class token


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor: of the source's (loaded, resampled, ignored) and of the model's
    (loaded, resampled, new). str() of it is for a person."""

    source: str
    loaded: tuple[str, ...]
    resampled: dict[str, str] = field(default_factory=dict)  # name: from what to what
    new: tuple[str, ...] = ()  # keep their fresh weights
    ignored: dict[str, str] = field(default_factory=dict)  # name: why

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  resampled: {name}, {how}" for name, how in self.resampled.items()]
        if self.new:
            lines.append(f"  new: {listed(list(self.new))}")
        by_reason: dict[str, list[str]] = {}
        for name, why in self.ignored.items():
            by_reason.setdefault(why, []).append(name)
        lines += [f"  ignored: {listed(names)} ({why})" for why, names in by_reason.items()]
        return "\n".join(lines)


def load_into(
    backbone: VisionTransformer, incoming: Incoming, *, head: nn.Module | None = None
) -> LoadReport:
    """Copy incoming's weights into backbone, and its class head into `head` if one is given and fits.

    Position embeddings of another image size are resampled by timm's rule (bicubic, antialiased, in
    float32, the class token's aside). With the other pooling the final norm is carried over. A
    backbone with fixed sine-cosine positions keeps its own.

    Raises CheckpointError, and changes nothing, when a tensor is missing, has another shape, has no
    place to go, or when the same weights would mean another function (other heads, learned positions
    where they are fixed).
    """
    target = {**dict(backbone.named_parameters()), **_persistent_buffers(backbone)}
    found = dict(incoming.backbone)
    theirs, ours = final_norm(incoming.spec.pooling), final_norm(backbone.pooling)
    carried = {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    complaints: list[str] = []
    values: dict[str, Tensor] = {}
    resampled: dict[str, str] = {}
    ignored = dict(incoming.left_out)

    heads = cast(Block, backbone.blocks[0]).attn.num_heads
    if "num_heads" not in incoming.assumed and heads != incoming.spec.num_heads:
        complaints.append(f"it has {incoming.spec.num_heads} heads, the model {heads}")
    for name, tensor in target.items():
        value = found.pop(carried.get(name, name), None)
        if value is None:
            complaints.append(f"{name} is missing")
            continue
        if name == "pos_embed" and backbone.position_embedding == "sincos":
            if not _is_sincos(value):
                complaints.append(
                    "pos_embed was learned, the model's is fixed (model.position_embedding=sincos)"
                )
            elif value.shape != tensor.shape:
                ignored[name] = "the model has a fixed one of its own size"
            else:
                values[name] = value
            continue
        if name == "pos_embed" and value.shape[1] != tensor.shape[1] and value.shape[2] == tensor.shape[2]:
            old, new = incoming.spec.grid, backbone.grid
            value = resample_pos_embed(value, new, NUM_PREFIX_TOKENS, rule="timm")
            resampled[name] = f"{old}×{old} to {new}×{new} patches"
        if value.shape != tensor.shape:
            complaints.append(f"{name} is {tuple(value.shape)}, the model's {tuple(tensor.shape)}")
        else:
            values[name] = value
    complaints += [f"{name} has no place in the model" for name in found]
    if complaints:
        raise CheckpointError(
            f"{incoming.source} does not fit the model: {'; '.join(complaints[:8])}"
            f"{f'; and {len(complaints) - 8} more' if len(complaints) > 8 else ''}. Give the model the "
            f"dimensions it was trained with ({_dimensions(incoming.spec)}), or another init_from"
        )
    return _copy(backbone, incoming, head, values, resampled, ignored)


def _copy(
    backbone: VisionTransformer,
    incoming: Incoming,
    head: nn.Module | None,
    values: Mapping[str, Tensor],
    resampled: Mapping[str, str],
    ignored: dict[str, str],
) -> LoadReport:
    new: list[str] = []
    head_values: dict[str, Tensor] = {}
    head_target = {} if head is None else dict(head.named_parameters())
    if head_target:
        fits = {name: value.shape for name, value in incoming.head.items()} == {
            name: value.shape for name, value in head_target.items()
        }
        head_values = incoming.head if fits else {}
        new = [] if fits else [f"head.{name}" for name in head_target]
    if incoming.head and not head_values:
        why = "not asked for" if head is None else "of another shape than the model's"
        ignored.update({f"head.{name}": f"the class head was {why}" for name in incoming.head})
    target = {**dict(backbone.named_parameters()), **_persistent_buffers(backbone)}
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
        for name, value in head_values.items():
            head_target[name].copy_(value)
    loaded = [name for name in values if name not in resampled] + [f"head.{name}" for name in head_values]
    new += [name for name in target if name not in values]
    return LoadReport(
        source=str(incoming.source),
        loaded=tuple(loaded),
        resampled=dict(resampled),
        new=tuple(new),
        ignored=ignored,
    )


def rebuild(spec: BackboneSpec, weights: Mapping[str, Tensor]) -> VisionTransformer:
    """The backbone that spec describes, holding exactly `weights`, float32, in eval mode."""
    backbone = build_backbone(spec)
    # Its own positions, whatever they are: an export may hold a fixed table at another size.
    backbone.load_state_dict(dict(weights), strict=True)
    return backbone.eval()


def _persistent_buffers(module: nn.Module) -> dict[str, Any]:
    kept = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in kept}


def _is_sincos(pos_embed: Tensor) -> bool:
    grid = round((pos_embed.shape[1] - NUM_PREFIX_TOKENS) ** 0.5)
    if pos_embed.shape[2] % 4 or grid**2 + NUM_PREFIX_TOKENS != pos_embed.shape[1]:
        return False
    return torch.allclose(pos_embed, sincos_pos_embed(grid, pos_embed.shape[2]), atol=1e-5)


def _dimensions(spec: BackboneSpec) -> str:
    return (
        f"model.patch_size={spec.patch_size}, embed_dim={spec.embed_dim}, depth={spec.depth}, "
        f"num_heads={spec.num_heads}, mlp_ratio={spec.mlp_ratio:g}, "
        f"position_embedding={spec.position_embedding}"
    )
