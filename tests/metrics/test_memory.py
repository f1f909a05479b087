"""Memory by formula: activations against what autograd keeps, state as ZeRO cuts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.assemble import build_objective
from pretrain.config.load import parse_config
from pretrain.cost import cost_of
from pretrain.metrics.memory import state_bytes
from pretrain.models import layers, pvt, swin_parts

COUNT = {"swin_v2": 32}  # images, 4 of the others: what makes its biases is kept once a batch
VIT = {"image_size": 48, "patch_size": 4, "embed_dim": 96, "depth": 8, "num_heads": 4, "mlp_ratio": 3.0}
SWIN = {
    "name": "swin",
    "image_size": 64,
    "embed_dim": 48,
    "depths": [2, 2, 2],
    "stage_heads": [2, 4, 8],
    "window_size": 4,
}
PVT = {
    "name": "pvt",
    "image_size": 64,
    "embed_dims": [32, 64, 80],
    "depths": [2, 2, 2],
    "stage_heads": [1, 2, 5],
    "mlp_ratios": [8.0, 8.0, 4.0],
    "sr_ratios": [4, 2, 1],
}
MODELS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit average": {**VIT, "pooling": "avg"},
    "vit swiglu": {**VIT, "mlp": "swiglu"},
    "vit qk_norm": {**VIT, "qk_norm": True},
    "vit registers": {**VIT, "num_registers": 4},
    "vit layer scale": {**VIT, "layer_scale_init": 0.1},
    "vit map": {**VIT, "pooling": "map"},
    "swin": SWIN,
    "swin padded": {**SWIN, "window_size": 5},
    "swin_v2": {**SWIN, "name": "swin_v2"},
    "pvt": PVT,
}
DECODER = {"decoder_dim": 48, "decoder_depth": 3, "decoder_heads": 2}
CASES = [
    *((name, "classification") for name in MODELS),
    *((name, "mae") for name in ("vit", "vit average", "vit swiglu", "vit registers")),
    *((name, "simmim") for name in ("vit", "swin", "swin_v2", "pvt")),
]
# a CPU's fused attention takes no bias that is trained, as Swin's is
FUSED_CASES = [(name, objective) for name, objective in CASES if not name.startswith("swin")]


def saved_bytes(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """What autograd keeps for the backward, each storage once, without weights and buffers."""
    of_module = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_module:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    assert loss.requires_grad
    return sum(kept.values())


def fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    assert bias is None, "see FUSED_CASES"
    return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    ("name", "objective", "is_fused"),
    [(*case, False) for case in CASES] + [(*case, True) for case in FUSED_CASES],
)
def test_the_model_of_activations_is_within_five_percent_of_what_autograd_keeps(
    name: str, objective: str, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"name": objective, **(DECODER if objective == "mae" else {})}
    if objective == "simmim":
        chosen["mask_patch_size"] = 16
    config = parse_config(
        {
            "run_dir": "run",
            "model": MODELS[name],
            "objective": chosen,
            "data": {"train": "shards"},
            "train": {"global_batch_size": 8, "steps": 1, "precision": "float32"},
        },
        source="test",
    )
    for module in (layers, swin_parts, pvt):
        monkeypatch.setattr(module, "attention", fused if is_fused else layers.plain_attention)
    objective_module = build_objective(config, num_classes=10)
    side, count = config.model.image_size, COUNT.get(name, 4)
    images = torch.randn(count, 3, side, side)
    batch = {
        "labels": torch.zeros(count, dtype=torch.int64),
        "weights": torch.ones(count),
        "positions": torch.arange(count),
    }
    measured = saved_bytes(objective_module, lambda: objective_module(images, batch)[0]) / count
    modelled = cost_of(config, 10).network.kept_bytes(value_bytes=4, fused_attention=is_fused)
    assert modelled == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "bytes_a_parameter"),
    [
        ({"stage": 0, "bf16": False}, 16),
        ({"stage": 0, "bf16": True}, 16),
        ({"stage": 1, "bf16": True}, 2 + 2 + 12 / 4),
        ({"stage": 1, "bf16": True, "accumulates": True}, 2 + 2 + 4 + 12 / 4),
        ({"stage": 2, "bf16": True}, 2 + 2 / 4 + 12 / 4),
        ({"stage": 3, "bf16": True, "ema": True}, (2 + 2 + 12 + 4) / 4),
    ],
)
def test_state_is_cut_over_ranks_as_zero_does_it(settings: dict[str, Any], bytes_a_parameter: float) -> None:
    """Two ranks' own bytes are counted in tests/engine/test_state_bytes.py."""
    state = state_bytes(1000, world_size=4, **settings)
    assert state.total == pytest.approx(1000 * bytes_a_parameter)
