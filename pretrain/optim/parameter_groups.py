"""Which parameters decay. Called where an optimizer is built."""

from __future__ import annotations

from typing import Any

from torch import nn

# embeddings and tokens: decay would pull them to zero, not to smoothness (timm's no_weight_decay)
NEVER_DECAYED = frozenset({"cls_token", "pos_embed", "reg_token", "dist_token", "mask_token"})


def decays(name: str, num_dims: int) -> bool:
    """Whether the parameter of that dotted name and number of dimensions takes weight decay.

    Biases, norms (one dimension) and the tokens above do not, as in timm.
    """
    last = name.rsplit(".", 1)[-1]
    return num_dims > 1 and last != "bias" and last not in NEVER_DECAYED


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: {"params": [...], "names": [...], "weight_decay": float}.

    The decayed group first, then the other; an empty one is left out. Inside a group, parameters stand
    in the order of `named_parameters`, each with its name at the same place. Frozen ones are left out.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 leaves an empty tensor in place of a partitioned weight and keeps its shape aside
        shape = getattr(parameter, "ds_shape", parameter.shape)
        group = groups[0 if decays(name, len(shape)) else 1]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups if group["params"]]
