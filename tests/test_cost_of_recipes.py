"""What the model says that recipes cost, against torch's own counter on the networks that the recipes build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pretrain.assemble import build_objective
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.cost import cost_of
from pretrain.metrics.blocks import Network
from pretrain.metrics.flops import training_flops
from pretrain.models import layers, pvt, swin_parts

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COUNT = 8  # images; they cost nothing without memory


@pytest.fixture(autouse=True)
def _attention_as_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counter does not know all of its fused ones."""
    for module in (layers, swin_parts, pvt):
        monkeypatch.setattr(module, "attention", layers.plain_attention)


def counted(objective: nn.Module, config: RunConfig, *, backward: bool) -> float:
    """FLOPs of one image, by torch, on a device that has shapes and no numbers."""
    side = config.model.image_size
    with torch.device("meta"):
        images = torch.zeros(COUNT, 3, side, side)
        batch = {
            "labels": torch.zeros(COUNT, dtype=torch.int64),
            "weights": torch.ones(COUNT),
            "positions": torch.arange(COUNT),
        }
        with FlopCounterMode(display=False) as counter:
            loss, _ = objective(images, batch)
            if backward:
                loss.backward()
    return counter.get_total_flops() / COUNT


def without_depthwise(network: Network) -> Network:
    return replace(network, blocks=[replace(blocks, depthwise=False) for blocks in network.blocks])


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_work_of_every_recipe_is_within_two_percent_of_torchs_counter(path: Path) -> None:
    config = load_config(path)
    classes = config.objective.num_classes or 1000
    with torch.device("meta"):
        objective = build_objective(config, num_classes=classes)
    cost = cost_of(config, classes)
    network = cost.network
    assert cost.parameters == sum(p.numel() for p in objective.parameters())
    assert network.flops() == pytest.approx(counted(objective, config, backward=False), rel=0.02)
    if config.model.name == "pvt":
        # torch's counter takes a depthwise convolution's backward for a full one's: training is compared without them
        network = without_depthwise(network)
        for part in list(objective.modules()):
            if isinstance(part, pvt.ConvolutionMlp):
                part.dwconv = nn.Identity()  # type: ignore[assignment]
    assert training_flops(network) == pytest.approx(counted(objective, config, backward=True), rel=0.02)
