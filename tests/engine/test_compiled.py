"""torch.compile of blocks: what is compiled, and that nothing but the speed changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pretrain.engine.compiled import compile_blocks, repeated_blocks
from pretrain.engine.debug import AccelerateEngine
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE


def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, drop_path_rate=0.1
    )


def batch_of(count: int) -> dict[str, torch.Tensor]:
    return {
        "labels": torch.arange(count) % 5,
        "weights": torch.ones(count),
        "positions": torch.arange(count),
    }


def three_steps(objective: nn.Module) -> tuple[list[float], dict[str, torch.Tensor]]:
    engine = AccelerateEngine(
        objective,
        build_optimizer=lambda module: torch.optim.AdamW(module.parameters(), lr=0.0),
        precision="float32",
        clip_grad_norm=1.0,
        device=torch.device("cpu"),
    )
    losses = []
    for step in range(3):
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        loss, _ = engine.forward(images, batch_of(4))
        engine.backward(loss / 4)
        engine.step(1e-3)
        losses.append(float(loss.detach()))
    return losses, {one.name: one.tensors["weight"].clone() for one in engine.fragments()}


@pytest.mark.parametrize("kind", ["classification", "mae"])
def test_compiled_blocks_train_as_others_do_and_their_parameters_keep_their_names(kind: str) -> None:
    objective: nn.Module = (
        MAE(backbone(), seed=0, decoder_dim=16, decoder_depth=2, decoder_heads=2)
        if kind == "mae"
        else Classification(backbone(), num_classes=5)
    )
    plain = copy.deepcopy(objective)
    # the compiler's front is what could break here; its back end takes long on a CPU
    assert compile_blocks(objective, backend="aot_eager") == (5 if kind == "mae" else 3)
    (losses, weights), (wanted_losses, wanted) = three_steps(objective), three_steps(plain)
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    assert list(weights) == list(wanted)
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_of_stages_of_blocks_the_blocks_are_compiled() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.norm = nn.LayerNorm(2)

    whole = nn.Module()
    whole.stages = nn.Sequential(Stage(), Stage())  # type: ignore[assignment]
    assert all(isinstance(block, nn.Linear) for block in repeated_blocks(whole))
    assert len(list(repeated_blocks(whole))) == 4
