"""LAMB, arXiv:1904.00962, on whole parameters or on a rank's flat shards of them (ZeRO stages 1 and 2).

Built by pretrain/optimizer.py. On shards, engine/zero.py tells which piece of which parameter lies where (`bind`).
"""

# P parameters

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements [offset, offset + count) of the flattened tensor `held`, which belong to the parameter `name`."""

    name: str
    held: torch.Tensor
    offset: int
    count: int


class Lamb(torch.optim.Optimizer):
    """Adam's update plus decay, of a parameter as long as its weight is: lr · |w| / |u| · u.

    As in timm and in NVIDIA's: gradients are averaged, moments corrected, and parameters without weight decay (norms,
    biases, tokens) take Adam's update as it is. Gradients are clipped by the engine, not here.

    params: groups as `parameter_groups` makes them. All are put into one group: so ZeRO lays them into one
    shard, one call updates it, and the norms of all parameters take one all-reduce.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        together: dict[str, Any] = {"params": [], "names": []}
        together |= {"weight_decays": [], "lr_scales": [], "of_backbone": []}
        for group in params:
            count = len(group["params"])
            together["params"] += group["params"]
            together["names"] += group["names"]
            together["weight_decays"] += [group["weight_decay"]] * count
            together["lr_scales"] += [group.get("lr_scale", 1.0)] * count
            together["of_backbone"] += [group.get("is_backbone", False)] * count
        self._pieces: list[Piece] | None = None
        self._reduce: Callable[[torch.Tensor], Any] | None = None
        super().__init__([together], {"lr": lr, "betas": betas, "eps": eps, "freeze_backbone": False})

    def bind(self, pieces: Sequence[Piece], all_reduce: Callable[[torch.Tensor], Any]) -> None:
        """From now on the parameters are these pieces of this rank and others of other ranks.

        all_reduce: sums a tensor over all ranks, in place.
        """
        self._pieces, self._reduce = list(pieces), all_reduce

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "engines give no closure"
        (group,) = self.param_groups
        pieces = self._pieces
        if pieces is None:
            if len(group["params"]) != len(group["names"]):
                return  # DeepSpeed has flattened them, and takes a trial step before it can be told what lies where
            pieces = [
                Piece(name=name, held=held, offset=0, count=held.numel())
                for name, held in zip(group["names"], group["params"], strict=True)
                if held.grad is not None
            ]
            if not pieces:  # a step that is left out
                return
        steps = self._count_step(pieces)
        self._update(group, pieces, steps)

    def _count_step(self, pieces: Sequence[Piece]) -> int:
        held = self.param_groups[0]["params"] if self._pieces is not None else [p.held for p in pieces]
        for tensor in held:
            state = self.state[tensor]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(tensor)
                state["exp_avg_sq"] = torch.zeros_like(tensor)
            state["step"] += 1
        return int(self.state[held[0]]["step"])

    def _update(self, group: dict[str, Any], pieces: Sequence[Piece], steps: int) -> None:
        beta1, beta2 = group["betas"]
        place = {name: number for number, name in enumerate(group["names"])}
        numbers = [place[piece.name] for piece in pieces]
        decays_P, device = group["weight_decays"], group["params"][0].device

        def part(piece: Piece, tensor: torch.Tensor | None) -> torch.Tensor:
            assert tensor is not None, f"{piece.name}: no gradient"
            return tensor.detach().view(-1).narrow(0, piece.offset, piece.count)

        norms_2P = torch.zeros(2, len(place), dtype=torch.float64, device=device)
        weights = [part(piece, piece.held) for piece in pieces]
        updates: list[torch.Tensor] = []
        if pieces:
            gradients = [part(piece, piece.held.grad) for piece in pieces]
            firsts = [part(piece, self.state[piece.held]["exp_avg"]) for piece in pieces]
            seconds = [part(piece, self.state[piece.held]["exp_avg_sq"]) for piece in pieces]
            torch._foreach_lerp_(firsts, gradients, 1 - beta1)
            torch._foreach_mul_(seconds, beta2)
            torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
            denominators = list(torch._foreach_sqrt(seconds))
            torch._foreach_div_(denominators, math.sqrt(1 - beta2**steps))
            torch._foreach_add_(denominators, group["eps"])
            updates = list(torch._foreach_div(firsts, denominators))
            torch._foreach_div_(updates, 1 - beta1**steps)
            decay = [decays_P[number] for number in numbers]
            torch._foreach_add_(updates, torch._foreach_mul(weights, decay))
            where = torch.tensor(numbers, device=device)
            for row, tensors in enumerate((weights, updates)):
                squares = torch.stack(torch._foreach_norm(tensors)).double().square()
                norms_2P[row].index_add_(0, where, squares)
        if self._reduce is not None:
            self._reduce(norms_2P)
        if not pieces:  # of the others' parameters this rank holds nothing
            return
        weight_P, update_P = norms_2P.sqrt()
        adapts_P = torch.tensor([decay != 0 for decay in decays_P], device=device)
        adapts_P &= (weight_P > 0) & (update_P > 0)
        ratio_P = torch.where(adapts_P, weight_P / update_P, 1.0)
        rates = [
            0.0 if group["freeze_backbone"] and of_backbone else group["lr"] * scale
            for scale, of_backbone in zip(group["lr_scales"], group["of_backbone"], strict=True)
        ]
        rate_P = (torch.tensor(rates, dtype=torch.float64, device=device) * ratio_P).float()
        torch._foreach_mul_(updates, list(rate_P[where].unbind()))
        torch._foreach_sub_(weights, updates)
