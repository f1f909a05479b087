"""Put a backbone that was read (incoming.py) into a model, and account for every tensor.

Called by train.py for `init_from:`, and by evaluate and export. A model is only touched once all of
it is known to fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError
from pretrain.formats.incoming import Incoming
from pretrain.formats.naming import final_norm, listed
from pretrain.models.backbone import Backbone
from pretrain.models.build import build_backbone
from pretrain.models.pos_embed import resample_bias_table, resample_pos_embed, sincos_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer

BIAS_TABLE = "relative_position_bias_table"


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of every tensor: of the source's (loaded, resampled, ignored) and of the model's
    (loaded, resampled, new). str() of it is for a person."""

    source: str
    loaded: tuple[str, ...]
    resampled: dict[str, str] = field(default_factory=dict)  # name: from what to what
    new: tuple[str, ...] = ()  # keep their fresh weights
    ignored: dict[str, str] = field(default_factory=dict)  # name: why
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} tensors loaded"]
        lines += [f"  resampled: {name}, {how}" for name, how in self.resampled.items()]
        if self.new:
            lines.append(f"  new: {listed(list(self.new))}")
        by_reason: dict[str, list[str]] = {}
        for name, why in self.ignored.items():
            by_reason.setdefault(why, []).append(name)
        lines += [f"  ignored: {listed(names)} ({why})" for why, names in by_reason.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def load_into(backbone: Backbone, incoming: Incoming, *, head: nn.Module | None = None) -> LoadReport:
    """Copy incoming's weights into backbone, and its class head into `head` where one is given.

    Position embeddings of another image size are resampled by timm's rule (bicubic, antialiased, in
    float32, the class token's aside), a Swin's bias tables of another window bicubic; a Swin V2 needs
    neither. With another pooling the final norm is carried over, and attention pooling starts fresh where
    there was none. A backbone with fixed sine-cosine positions keeps its own.

    Raises CheckpointError, and changes nothing, when a tensor is missing, has another shape, has no
    place to go, or when the same weights would mean another function (other heads, learned positions
    where they are fixed, rotary positions on another grid, a Swin V2's in windows of another size); and as
    check_head, where `head` is given.
    """
    if head is not None:
        check_head(incoming, dict(head.named_parameters())["bias"].shape[0])
    target = {**dict(backbone.named_parameters()), **_persistent_buffers(backbone)}
    found = dict(incoming.backbone)
    carried = _carried_norm(backbone, incoming.spec)
    complaints = _other_functions(backbone, incoming)
    values: dict[str, Tensor] = {}
    resampled: dict[str, str] = {}
    ignored = dict(incoming.left_out)

    for name, tensor in target.items():
        value = found.pop(carried.get(name, name), None)
        if value is None:
            if not name.startswith("attn_pool."):
                complaints.append(f"{name} is missing")
            continue
        if name == "pos_embed" and isinstance(backbone, VisionTransformer):
            P = backbone.num_position_prefix
            if backbone.position_embedding == "sincos":
                if not _is_sincos(value, P):
                    complaints.append(
                        "pos_embed was learned, the model's is fixed (model.position_embedding=sincos)"
                    )
                elif value.shape != tensor.shape:
                    ignored[name] = "the model has a fixed one of its own size"
                else:
                    values[name] = value
                continue
            same_kind = incoming.spec.num_position_prefix == P and value.shape[2] == tensor.shape[2]
            if same_kind and value.shape[1] != tensor.shape[1]:
                old, new = incoming.spec.grid, backbone.grid
                value = resample_pos_embed(value, new, P, rule="timm")
                resampled[name] = f"{old}×{old} to {new}×{new} patches"
        elif name.endswith(BIAS_TABLE) and value.shape[0] != tensor.shape[0]:
            old, new = (round(len(table) ** 0.5) // 2 + 1 for table in (value, tensor))
            value = resample_bias_table(value, new)
            resampled[name] = f"windows of {old} to {new} tokens a side"
        if value.shape != tensor.shape:
            complaints.append(f"{name} is {tuple(value.shape)}, the model's {tuple(tensor.shape)}")
        else:
            values[name] = value
    for name in list(found):
        if name.startswith("attn_pool."):
            ignored[name] = "another pooling's"
            del found[name]
    complaints += [f"{name} has no place in the model" for name in found]
    if complaints:
        raise CheckpointError(
            f"{incoming.source} does not fit the model: {'; '.join(complaints[:8])}"
            f"{f'; and {len(complaints) - 8} more' if len(complaints) > 8 else ''}. Give the model the "
            f"dimensions it was trained with ({_dimensions(incoming.spec)}), or another init_from"
        )
    return _copy(backbone, incoming, head, values, resampled, ignored)


def check_head(incoming: Incoming, num_classes: int) -> None:
    """Raises CheckpointError where incoming has no class head, or one of another number of classes."""
    if not incoming.head:
        raise CheckpointError(
            f"{incoming.source} holds no class head, and init_head=true asks for it; leave init_head out, and a new "
            "one is trained"
        )
    theirs = incoming.head["bias"].shape[0]
    if theirs != num_classes:
        wider = (
            f", or set objective.num_classes={theirs} if its first classes are these"
            if theirs > num_classes
            else ""
        )
        raise CheckpointError(
            f"{incoming.source} has a class head of {theirs} classes, and this run has {num_classes}: init_head=true "
            f"takes one along as it is; leave init_head out, and a new one is trained{wider}"
        )


def with_head_for(incoming: Incoming, class_names: Sequence[str] | None) -> Incoming:
    """incoming with its class head for data whose classes have these names, in this order.

    Where it has all of these its rows are put in the data's order, and what it has beside them after. Where the names
    differ (ImageNet's come as words and as WordNet's numbers) it stays as it is, and a note says so. check_head goes
    before.
    """
    theirs = incoming.spec.class_names
    if not class_names or not theirs or theirs[: len(class_names)] == tuple(class_names):
        return incoming
    row_of = {name: row for row, name in enumerate(theirs)}
    if len(row_of) == len(theirs) and row_of.keys() >= set(class_names):
        rows = [row_of.pop(name) for name in class_names]
        rows += row_of.values()  # of classes that the data has none of
        return replace(
            incoming,
            head={name: value[rows] for name, value in incoming.head.items()},
            spec=replace(incoming.spec, class_names=tuple(theirs[row] for row in rows)),
            notes=(*incoming.notes, "the class head's rows are put in the order of this data's classes"),
        )
    number = next(i for i, name in enumerate(class_names) if theirs[i] != name)
    note = (
        f"the class head comes along by number, and its class {number} is named {theirs[number]!r}, this data's "
        f"{class_names[number]!r}; leave init_head out if they are not the same thing"
    )
    return replace(incoming, notes=(*incoming.notes, note))


def _carried_norm(backbone: Backbone, spec: BackboneSpec) -> dict[str, str]:
    """Where a ViT's final norm comes from when it is pooled another way: {ours: theirs}."""
    if not isinstance(backbone, VisionTransformer):
        return {}
    theirs, ours = final_norm(spec.pooling), final_norm(backbone.pooling)
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def _other_functions(backbone: Backbone, incoming: Incoming) -> list[str]:
    """What no shape says and would make another function of the same weights."""
    spec = incoming.spec
    complaints = []
    theirs = spec.stage_heads or (spec.num_heads,)
    if "num_heads" not in incoming.assumed and backbone.num_heads != theirs:
        old, new = (", ".join(map(str, heads)) for heads in (theirs, backbone.num_heads))
        complaints.append(f"it has {old} heads, the model {new}")
    if isinstance(backbone, SwinTransformer) and backbone.version == 2 and spec.name == "swin_v2":
        measured_by = spec.position_windows
        if "window_size" not in incoming.assumed and backbone.position_windows != measured_by:
            old, new = (
                ", ".join(map(str, sizes)) for sizes in (measured_by, backbone.position_windows or ())
            )
            complaints.append(
                f"its positions are measured by windows of {old} tokens a side, the model's by {new} "
                f"(set model.pretrained_window_sizes=[{old}])"
            )
    if isinstance(backbone, VisionTransformer) and spec.position_embedding == "rope":
        old_grid = spec.rotary_grid or spec.grid
        if backbone.position_embedding == "rope" and backbone.rotary_grid != old_grid:
            complaints.append(
                f"its rotary positions are scaled to {old_grid} patches a side, the model's to "
                f"{backbone.rotary_grid} (set model.rotary_grid={old_grid})"
            )
    if (spec.position_embedding == "rope") != (getattr(backbone, "position_embedding", None) == "rope"):
        complaints.append(f"its model.position_embedding is {spec.position_embedding}")
    return complaints


def _copy(
    backbone: Backbone,
    incoming: Incoming,
    head: nn.Module | None,
    values: Mapping[str, Tensor],
    resampled: Mapping[str, str],
    ignored: dict[str, str],
) -> LoadReport:
    head_target = {} if head is None else dict(head.named_parameters())
    head_values = {name: incoming.head[name] for name in head_target}
    if head is None:
        why = "the class head was not asked for"
        ignored.update({f"head.{name}": why for name in incoming.head})
    target = {**dict(backbone.named_parameters()), **_persistent_buffers(backbone)}
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
        for name, value in head_values.items():
            head_target[name].copy_(value)
    loaded = [name for name in values if name not in resampled] + [f"head.{name}" for name in head_values]
    new = [name for name in target if name not in values]
    return LoadReport(
        source=str(incoming.source),
        loaded=tuple(loaded),
        resampled=dict(resampled),
        new=tuple(new),
        ignored=ignored,
        notes=incoming.notes,
    )


def rebuild(spec: BackboneSpec, weights: Mapping[str, Tensor]) -> Backbone:
    """The backbone that spec describes, in eval mode, of exactly `weights`, float32, which it shares and not copies."""
    # A ViT, the only one that is ever huge, is not allocated only to be replaced; a Swin has tables of its own.
    with torch.device("meta") if spec.name == "vit" else nullcontext():
        backbone = build_backbone(spec)
    # Its own positions, whatever they are: an export may hold a fixed table at another size.
    backbone.load_state_dict(dict(weights), strict=True, assign=True)
    return backbone.eval()


def _persistent_buffers(module: nn.Module) -> dict[str, Any]:
    kept = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in kept}


def _is_sincos(pos_embed: Tensor, num_prefix_tokens: int) -> bool:
    grid = round((pos_embed.shape[1] - num_prefix_tokens) ** 0.5)
    if pos_embed.shape[2] % 4 or grid**2 + num_prefix_tokens != pos_embed.shape[1]:
        return False
    fixed = sincos_pos_embed(grid, pos_embed.shape[2], num_prefix_tokens=num_prefix_tokens)
    return torch.allclose(pos_embed, fixed, atol=1e-5)


def _dimensions(spec: BackboneSpec) -> str:
    if spec.name != "vit":
        return f"model.name={spec.name}, {spec}"
    return (
        f"model.patch_size={spec.patch_size}, embed_dim={spec.embed_dim}, depth={spec.depth}, "
        f"num_heads={spec.num_heads}, mlp_ratio={spec.mlp_ratio:g}, "
        f"position_embedding={spec.position_embedding}"
    )
