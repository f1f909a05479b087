"""torch.compile of blocks: what is compiled, and that nothing but the speed changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import nn

from pretrain.engine.compiled import compile_blocks, repeated_blocks
from pretrain.engine.debug import AccelerateEngine
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM


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
    whole.stages = nn.ModuleList([Stage(), Stage()])  # type: ignore[assignment]
    assert all(isinstance(block, nn.Linear) for block in repeated_blocks(whole))
    assert len(list(repeated_blocks(whole))) == 4


def test_a_small_network_inside_a_block_is_compiled_with_it() -> None:
    swin = SwinTransformer(
        image_size=16, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=2, version=2
    )
    assert list(repeated_blocks(swin)) == [block for stage in swin.layers for block in stage.blocks]


def swin() -> SwinTransformer:
    return SwinTransformer(
        image_size=64,
        patch_size=2,
        embed_dim=8,
        depths=(2, 2, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        drop_path_rate=0.2,
    )


def pvt() -> PyramidVisionTransformer:
    return PyramidVisionTransformer(
        image_size=64,
        embed_dims=(8, 16, 24, 32),
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 3, 4),
        mlp_ratios=(2.0, 2.0, 2.0, 2.0),
        sr_ratios=(8, 4, 2, 1),
        drop_path_rate=0.2,
    )


def subset_vit() -> VisionTransformer:
    return VisionTransformer(
        image_size=64,
        patch_size=16,
        embed_dim=16,
        depth=16,
        num_heads=2,
        drop_path_rate=0.6,
        drop_path_mode="batch_subset",
    )


MANY_FORMS: dict[str, Callable[[], nn.Module]] = {
    "classification swin": lambda: Classification(swin(), num_classes=5),
    "classification pvt": lambda: Classification(pvt(), num_classes=5),
    "simmim swin": lambda: SimMIM(swin(), seed=0, mask_patch_size=16),
    "simmim pvt": lambda: SimMIM(pvt(), seed=0, mask_patch_size=16),
    "classification vit batch_subset": lambda: Classification(subset_vit(), num_classes=5),
}


# the compiler's front decides what is compiled; all behind it takes long on a CPU
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case.startswith("simmim") else case
        for case in MANY_FORMS
    ],
)
def test_blocks_of_many_forms_are_compiled_all_of_them_in_training_and_in_validation(
    case: str, backend: str
) -> None:
    """torch keeps so many compiled forms and runs further ones uncompiled, in silence: here it raises an error."""
    torch.manual_seed(0)
    objective = MANY_FORMS[case]()
    plain = copy.deepcopy(objective)
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_blocks(objective, backend=backend)
        for module in (objective, plain):
            module.train()
            loss = module(images, batch_of(16))[0]
            loss.backward()
            module.eval()
            with torch.no_grad():
                other = module(images, batch_of(16))[0]
            if module is objective:
                losses = float(loss.detach()), float(other)
    assert losses == pytest.approx((float(loss.detach()), float(other)), rel=1e-5)
    for (name, mine), wanted in zip(objective.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)
