"""One forward and backward of a batch, looked at from close by: losses by sample, gradients by layer, and where
numbers stop being finite. Called by replay.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pretrain.data.label_bits import unpack_label_set
from pretrain.data.loader import Batch
from pretrain.engine.cpu_bf16 import bf16_products
from pretrain.steps import Prepare


@dataclass(kw_only=True)
class Findings:
    """Of the samples of a batch, without pads, in its order; images float32 on the host, as the network saw them."""

    positions: list[int] = field(default_factory=list)
    labels: list[int | tuple[int, ...]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)  # the gradient's 2-norm, from input to output
    first_output: str | None = None
    first_gradient: str | None = None
    parameters: list[str] = field(default_factory=list)  # those of the weights that are not finite


def inspect(objective: Any, micro_batches: Sequence[Batch], prepared: Prepare, *, bf16: bool) -> Findings:
    """`objective`, on its device, as a step would use it; its gradients are those of the batch's mean loss.

    A sample's loss is what the loss sum gains with its weight: objectives are sums over weighted samples, so that
    one backward gives all of them.
    """
    found = Findings(
        parameters=[name for name, p in objective.named_parameters() if not bool(torch.isfinite(p).all())]
    )
    device = next(objective.parameters()).device
    count = sum(objective.count(batch) for batch in micro_batches)
    of_one_sample = objective.count({"weights": torch.ones(1)})
    hooks = [module.register_forward_hook(_watch(found, name)) for name, module in _inner(objective)]
    try:
        for host_batch in micro_batches:
            images, batch = prepared(host_batch)
            weights = batch["weights"].clone().requires_grad_()
            with (
                bf16_products(device, enabled=bf16),
                torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            ):
                loss_sum, _ = objective(images, {**batch, "weights": weights})
                (loss_sum / count).backward()
            assert weights.grad is not None, "every objective weighs its samples"
            found.loss += float(loss_sum.detach()) / count
            real = (host_batch["weights"] > 0).nonzero().flatten().tolist()
            by_sample = (weights.grad * (count / of_one_sample)).cpu()
            for i in real:
                found.positions.append(int(host_batch["positions"][i]))
                found.labels.append(_label(host_batch, i))
                found.losses.append(float(by_sample[i]))
                found.images.append(images[i].detach().float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    squares: dict[str, float] = {}
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            square = float(parameter.grad.double().square().sum())
            squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
    found.layers = {name: square**0.5 for name, square in squares.items()}
    found.grad_norm = sum(squares.values()) ** 0.5
    return found


def _label(host_batch: Batch, i: int) -> int | tuple[int, ...]:
    """The sample's label, or of multi-label data all of them."""
    if "label_bits" in host_batch:
        return unpack_label_set(host_batch["label_bits"][i].numpy())
    return int(host_batch["labels"][i])


def layer_of(parameter: str) -> str:
    """`backbone.blocks.3.attn.qkv.weight` is of `backbone.blocks.3`, `backbone.cls_token` of itself."""
    parts = parameter.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:2])


def _inner(objective: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in objective.named_modules() if name]


def _watch(found: Findings, name: str) -> Callable[[nn.Module, Any, Any], None]:
    """Note the first module whose output is not finite, and the first whose output's gradient is not."""

    def forward_hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [one for one in _tensors(output) if one.is_floating_point()]
        if found.first_output is None and not _finite(tensors):
            given = "a finite input" if _finite(_tensors(inputs)) else "an input that is not"
            own = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
            also = f", whose weights {', '.join(own[:3])} are not finite" if own else ""
            found.first_output = f"{name} ({type(module).__name__}), of {given}{also}"
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(backward_hook)

    def backward_hook(gradient: torch.Tensor) -> None:
        if found.first_gradient is None and not _finite([gradient]):
            found.first_gradient = f"of {name}'s output"

    return forward_hook


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _finite(tensors: Sequence[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
