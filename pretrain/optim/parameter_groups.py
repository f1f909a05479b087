"""Which parameters decay, and at what share of the learning rate each one learns. Called where an optimizer is built,
and by the engines, which set the rates of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

BACKBONE, HEAD = "backbone.", "head."  # of an objective's parameters
POSITION_MLP = "cpb_mlp"  # what makes a Swin V2's biases of offsets

# Embeddings and tokens: decay would pull them to zero, not to smoothness (timm's no_weight_decay). `latent` is the
# query of attention pooling, a token like them: big_vision, whose ViT-g has it, decays kernels alone; timm decays it.
NEVER_DECAYED = frozenset(
    {
        *("cls_token", "pos_embed", "reg_token", "dist_token", "mask_token", "latent"),
        "relative_position_bias_table",
        *("logit_scale", POSITION_MLP),  # a Swin V2's: the authors' no_weight_decay_keywords
    }
)


def decays(name: str, num_dims: int) -> bool:
    """Whether the parameter of that dotted name and number of dimensions takes weight decay.

    Biases, norms (one dimension) and what is named above do not, as in timm.
    """
    parts = name.split(".")
    return num_dims > 1 and parts[-1] != "bias" and NEVER_DECAYED.isdisjoint(parts)


def is_hidden_matrix(name: str, num_dims: int) -> bool:
    """Whether Muon takes it: the matrices inside blocks, not the embeddings before and the head after them, nor what
    makes a bias of two coordinates.
    """
    inside = ".blocks." in f".{name}" and POSITION_MLP not in name.split(".")
    return num_dims == 2 and inside and name.endswith(".weight")


def layer_scales(layer_of: Callable[[str], int], *, num_layers: int, decay: float) -> Callable[[str], float]:
    """Layer-wise learning-rate decay (BEiT, arXiv:2106.08254; MAE): name of a parameter -> its share of the rate.

    decay ** (num_layers - 1 - layer): `layer_of` tells the layer of a backbone's parameter, 0 for the embeddings, i + 1
    for block i, num_layers - 1 for what comes after the blocks. What is not of the backbone learns at the full rate.
    """

    def scale(name: str) -> float:
        if not name.startswith(BACKBONE):
            return 1.0
        return decay ** (num_layers - 1 - layer_of(name.removeprefix(BACKBONE)))

    return scale


def only_last_blocks(
    layer_of: Callable[[str], int], *, num_layers: int, blocks: int
) -> Callable[[str], float]:
    """1.0 for the backbone's last `blocks` blocks, what follows them, and all that is not of the backbone; 0.0 for the
    rest, of 0 blocks for all of the backbone. `layer_of`, `num_layers`: as for `layer_scales`.
    """

    def scale(name: str) -> float:
        if not name.startswith(BACKBONE):
            return 1.0
        first = num_layers - 1 - blocks if blocks else num_layers
        return float(layer_of(name.removeprefix(BACKBONE)) >= first)

    return scale


def without_gradients(module: nn.Module, layer_scale: Callable[[str], float]) -> None:
    """Make nothing of the gradients of what learns at a rate of 0, so that clipping counts what is trained alone.

    Such parameters stay in the optimizer, at whose rate of 0 an update is exactly nothing: checkpoints hold them like
    the others, at every ZeRO stage.
    """
    for name, parameter in module.named_parameters():
        if layer_scale(name) == 0.0 and parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    head_weight_decay: float | None = None,
    head_lr_scale: float = 1.0,
    layer_scale: Callable[[str], float] = lambda _: 1.0,
    apart: bool = False,
    muon_lr_scale: float | None = None,
    muon_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: {"params": [...], "names": [...], "weight_decay": float, "lr_scale": float,
    "is_backbone": bool, "use_muon": bool}.

    Groups that decay come first; an empty one is left out. Inside a group, parameters stand in the order of
    `named_parameters`, each with its name at the same place. Frozen ones are left out.

    layer_scale: see `layer_scales`. apart: no group holds parameters of the backbone and others. muon_lr_scale: hidden
    matrices get groups of their own, for Muon, which learn at that share of the rate and decay by muon_weight_decay.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 leaves an empty tensor in place of a partitioned weight and keeps its shape aside
        num_dims = len(getattr(parameter, "ds_shape", parameter.shape))
        decay, lr_scale = weight_decay, layer_scale(name)
        if name.startswith(HEAD):
            lr_scale *= head_lr_scale
            decay = weight_decay if head_weight_decay is None else head_weight_decay
        use_muon = muon_lr_scale is not None and is_hidden_matrix(name, num_dims)
        if use_muon:
            assert muon_lr_scale is not None, "only Muon has hidden matrices"
            lr_scale, decay = lr_scale * muon_lr_scale, muon_weight_decay
        does_decay = decays(name, num_dims)
        settings = {
            "weight_decay": decay if does_decay else 0.0,
            "lr_scale": lr_scale,
            "is_backbone": apart and name.startswith(BACKBONE),
            "use_muon": use_muon,
        }
        group = groups.setdefault((does_decay, *settings.values()), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: not key[0])]


def set_learning_rates(groups: Iterable[dict[str, Any]], lr: float, *, freeze_backbone: bool = False) -> None:
    """Give each group its share of `lr`; with `freeze_backbone` the backbone's, which must stand apart, get 0.

    At a rate of 0 an update and its decay are exactly nothing, at every ZeRO stage, and moments are kept up to date:
    the backbone's first real update is not thrown off by empty ones.
    """
    for group in groups:
        frozen = freeze_backbone and group.get("is_backbone", False)
        group["lr"] = 0.0 if frozen else lr * group.get("lr_scale", 1.0)
        group["freeze_backbone"] = freeze_backbone
