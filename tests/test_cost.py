"""A recipe's cost by arithmetic against the modules that it builds: parameters, and FLOPs by torch's counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.assemble import build_objective
from pretrain.config.load import parse_config
from pretrain.cost import cost_of

VIT = {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8, "image_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit registers": {**VIT, "num_registers": 4, "layer_scale_init": 1e-4, "qk_norm": True},
    "vit swiglu": {**VIT, "mlp": "swiglu"},
    "vit map": {**VIT, "pooling": "map"},
    "vit map swiglu": {**VIT, "pooling": "map", "mlp": "swiglu"},
    "vit rope": {**VIT, "position_embedding": "rope"},
    "swin": {"name": "swin", "size": "tiny", "image_size": 96, "window_size": 6},
    "swin padded": {"name": "swin", "size": "tiny", "image_size": 64},
    "swin_v2": {"name": "swin_v2", "size": "tiny", "image_size": 96, "window_size": 6},
    "swin_v2 padded": {"name": "swin_v2", "size": "tiny", "image_size": 64},
    "swin free": {
        "name": "swin",
        "embed_dim": 24,
        "depths": [2, 2],
        "stage_heads": [2, 4],
        "image_size": 64,
        "window_size": 4,
        "patch_size": 2,
    },
    "pvt": {"name": "pvt", "size": "b0", "image_size": 64},
}
DECODER = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2}
CASES = [
    (name, objective)
    for name, model in MODELS.items()
    for objective in ("classification", "mae", "simmim")
    # what those objectives are not defined for
    if objective == "classification" or model.get("pooling") != "map"
    if objective != "mae" or "name" not in model
]


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_parameters_and_forward_flops_are_those_of_the_modules(name: str, objective: str) -> None:
    config = parse_config(
        {
            "run_dir": "run",
            "model": MODELS[name],
            "objective": {"name": objective, **(DECODER if objective == "mae" else {})},
            "data": {"train": "shards"},
            "train": {"global_batch_size": 8, "steps": 1, "precision": "float32"},
        },
        source="test",
    )
    module, cost = build_objective(config, num_classes=10), cost_of(config, 10)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    side = config.model.image_size
    batch = {
        "labels": torch.zeros(2, dtype=torch.int64),
        "weights": torch.ones(2),
        "positions": torch.arange(2),
    }
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(2, 3, side, side), batch)
    # a Swin V2's position biases are computed once a batch, and left out of an image's work
    once = sum(
        sum(found.values()) for part, found in counter.get_flop_counts().items() if part.endswith(".cpb_mlp")
    )
    assert (once > 0) == name.startswith("swin_v2")
    assert cost.network.flops() == (counter.get_total_flops() - once) / 2
