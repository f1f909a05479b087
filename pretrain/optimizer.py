"""From a recipe's `optim` section to the optimizer and the average of the weights. Called by assemble.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from pretrain.config.schema import RunConfig
from pretrain.derived import backbone_spec, peak_lr
from pretrain.models.layer_ids import layer_of, num_layers
from pretrain.optim.ema import WeightAverage
from pretrain.optim.lamb import Lamb
from pretrain.optim.muon import Muon
from pretrain.optim.parameter_groups import layer_scales, only_last_blocks, parameter_groups


def optimizer_builder(
    config: RunConfig, device: torch.device
) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Builds the optimizer of a module: its parameters in groups that decay and learn as the recipe says.

    The rate is 0 until a step sets it: DeepSpeed takes a trial step while it starts.
    """
    optim, peak = config.optim, peak_lr(config)
    fused = device.type == "cuda"

    def build(module: nn.Module) -> torch.optim.Optimizer:
        of_head = optim.head_weight_decay
        groups = parameter_groups(
            module,
            weight_decay=_decay(config, optim.weight_decay, peak),
            head_weight_decay=None if of_head is None else _decay(config, of_head, peak),
            head_lr_scale=optim.head_lr_scale,
            layer_scale=layer_scale(config),
            apart=optim.freeze_backbone_steps > 0,
            muon_lr_scale=optim.muon_lr / peak if optim.name == "muon" else None,
            muon_weight_decay=_decay(config, optim.weight_decay, optim.muon_lr),
        )
        if optim.name == "lamb":
            return Lamb(groups, lr=0.0, betas=optim.betas, eps=optim.eps)
        if optim.name == "muon":
            momentum = optim.muon_momentum
            return Muon(groups, lr=0.0, momentum=momentum, betas=optim.betas, eps=optim.eps, fused=fused)
        return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=fused)

    return build


def _decay(config: RunConfig, weight_decay: float, peak: float) -> float:
    """What the optimizer, which multiplies its decay by the rate, must be given; see optim.weight_decay_times."""
    return weight_decay / peak if config.optim.weight_decay_times == "schedule" else weight_decay


def layer_scale(config: RunConfig) -> Callable[[str], float]:
    """The share of the rate at which a parameter of that name learns, by optim.layer_decay and train_last_blocks."""
    decay, blocks = config.optim.layer_decay, config.optim.train_last_blocks
    if decay is None and blocks is None:
        return lambda _: 1.0
    spec = backbone_spec(config)
    depths = spec.depths or (spec.depth,)  # of each stage; a ViT is one

    def layer(parameter: str) -> int:
        return layer_of(spec.name, parameter, depths)

    count = num_layers(depths)
    decayed = layer_scales(layer, num_layers=count, decay=1.0 if decay is None else decay)
    if blocks is None:
        return decayed
    trained = only_last_blocks(layer, num_layers=count, blocks=blocks)
    return lambda name: decayed(name) * trained(name)


def average_builder(config: RunConfig) -> Callable[[list[torch.Tensor]], WeightAverage] | None:
    """Builds the average of an engine's masters; None where the recipe keeps none."""
    if config.optim.ema_decay is None:
        return None
    return partial(WeightAverage, decay=config.optim.ema_decay, warmup=config.optim.ema_warmup)
