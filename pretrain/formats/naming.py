"""Which tensors a backbone has, under timm's names, and which of a checkpoint's are none of it.

Called by the writers (timm.py, hugging_face.py) and by incoming.py: every tensor that comes in is
either part of the backbone, part of the class head, or named with the reason why it stays behind.
"""

# K classes, D width

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec

# First match wins. What a pretraining task adds around the backbone, by the names that our own
# objectives, timm, MAE and transformers give it. A mask_token above all must never reach an export:
# timm would take the file for DINOv2's.
LEFT_OUT = (
    (r"(.*\.)?mask_token", "used by the pretraining task only"),
    (r"decoder.*", "the pretraining task's decoder"),
    (r"(vit\.)?pooler\..*", "a pooler, which this backbone does not have"),
    (r"(fc_norm|norm|attn_pool)\..*", "another pooling's"),
    (r"head_dist\..*|pre_logits\..*|(head|classifier)\..*", "another head than one linear layer"),
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A checkpoint's tensors, sorted out. head is {} or {"weight": (K, D), "bias": (K,)}."""

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: dict[str, str] = field(default_factory=dict)  # name: why


def final_norm(pooling: str) -> str:
    """A ViT's: timm norms the tokens before the class token is taken, but the mean after taking it."""
    return "fc_norm" if pooling == "avg" else "norm"


def backbone_shapes(spec: BackboneSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the backbone that spec describes, in timm's order."""
    with torch.device("meta"):  # shapes alone: nothing is allocated or drawn
        return {name: tuple(value.shape) for name, value in build_backbone(spec).state_dict().items()}


def why_left_out(name: str) -> str | None:
    """Why a tensor that is not the backbone's stays behind; None for one that nobody knows."""
    return next((why for pattern, why in LEFT_OUT if re.fullmatch(pattern, name)), None)


def sort_out(tensors: Mapping[str, Tensor], spec: BackboneSpec, *, where: str) -> Parts:
    """Split tensors, in timm's names, into backbone, class head and the rest.

    Raises CheckpointError, naming `where` and the tensors, when one of the backbone's is missing or
    has another shape than spec says, or when there is one that this backbone has no place for:
    without it the features would be others.
    """
    shapes = backbone_shapes(spec)
    head = {name: tensors[f"head.{name}"] for name in ("weight", "bias") if f"head.{name}" in tensors}
    if set(head) != {"weight", "bias"} or head["weight"].ndim != 2:
        head = {}
    left_out: dict[str, str] = {}
    unknown: list[str] = []
    for name in tensors:
        if name in shapes or (head and name in ("head.weight", "head.bias")):
            continue
        reason = why_left_out(name)
        if reason is None:
            unknown.append(name)
        else:
            left_out[name] = reason
    missing = [name for name in shapes if name not in tensors]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if head:
        K = spec.num_classes if spec.num_classes is not None else head["weight"].shape[0]
        for name, shape in (("weight", (K, spec.embed_dim)), ("bias", (K,))):
            if tuple(head[name].shape) != shape:
                wrong.append(f"head.{name} is {tuple(head[name].shape)}, not {shape}")
    complaints = [
        f"{title} {listed(names)}"
        for title, names in (("missing:", missing), ("wrong shape:", wrong), ("no place for:", unknown))
        if names
    ]
    if complaints:
        raise CheckpointError(
            f"{where} does not hold the backbone it describes ({spec}): " + "; ".join(complaints)
        )
    return Parts(backbone={name: tensors[name] for name in shapes}, head=head, left_out=left_out)


def listed(names: list[str], most: int = 8) -> str:
    """Names for one line of a message; the count where they are many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def with_start_renamed(name: str, starts: Mapping[str, str]) -> str:
    """`name` with the first of `starts` that it begins with exchanged for what stands beside it; as it is without."""
    start = next((start for start in starts if name.startswith(start)), None)
    return name if start is None else starts[start] + name.removeprefix(start)
