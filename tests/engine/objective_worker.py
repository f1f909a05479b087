"""One rank of test_objectives_over_ranks: each objective on each backbone, ten float32 steps at ZeRO stage 1.

Writes rank 0's losses to the file named on the command line. The test trains the same networks without an engine.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from zero_worker import (
    CLASSES,
    CLIP,
    IMAGE,
    LRS,
    PATCH,
    STEPS,
    global_batch,
    make_optimizer,
    micro_batches_of,
)

from pretrain.data.mixup import Mixing
from pretrain.data.order import slice_batch
from pretrain.distributed import Sums, World, join, leave, sum_over_ranks
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.errors import exit_code_kept
from pretrain.models.backbone import Backbone
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM

SEED, DROP_PATH = 5, 0.2
BATCH = 20  # 10 pairs: on three ranks 4, 3 and 3 of them, and slices of 8 in micro-batches of 4
MICRO = 4
CASES = [
    *(
        f"{objective} {backbone}"
        for objective in ("classification", "simmim")
        for backbone in ("vit", "swin", "swin_v2", "pvt")
    ),
    "mae vit",
]


def make_backbone(name: str, *, weight_init: str) -> Backbone:
    if name in ("swin", "swin_v2"):  # a shifted window in its first stage
        return SwinTransformer(
            image_size=IMAGE,
            embed_dim=12,
            depths=(2, 1),
            num_heads=(2, 4),
            window_size=2,
            drop_path_rate=DROP_PATH,
            version=2 if name == "swin_v2" else 1,
        )
    if name == "pvt":
        return PyramidVisionTransformer(
            image_size=IMAGE,
            embed_dims=(12, 24),
            depths=(1, 2),
            num_heads=(2, 4),
            mlp_ratios=(4.0, 4.0),
            sr_ratios=(2, 1),
            drop_path_rate=DROP_PATH,
        )
    return VisionTransformer(
        image_size=IMAGE,
        patch_size=PATCH,
        embed_dim=24,
        depth=2,
        num_heads=2,
        drop_path_rate=DROP_PATH,
        weight_init=weight_init,
    )


def make_objective(case: str) -> Classification | MAE | SimMIM:
    objective, name = case.split()
    torch.manual_seed(0)
    backbone = make_backbone(name, weight_init="mae" if objective == "mae" else "timm")
    if objective == "classification":
        return Classification(backbone, num_classes=CLASSES, label_smoothing=0.1, seed=SEED)
    if objective == "simmim":
        return SimMIM(backbone, seed=SEED, mask_patch_size=PATCH * 2 if name == "vit" else PATCH)
    assert isinstance(backbone, VisionTransformer), "MAE is for a ViT"
    return MAE(backbone, seed=SEED, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def mixed(case: str, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images and batch as the objective gets them: mixed where it is a classification."""
    if not case.startswith("classification"):
        return batch["images"], batch
    return Mixing(seed=SEED, mixup=0.8, cutmix=1.0)(batch["images"], batch)


def losses_of(case: str, world: World) -> list[float]:
    slice_size = len(slice_batch(torch.arange(BATCH).numpy(), rank=0, world_size=world.world_size))
    objective = make_objective(case)
    config = deepspeed_config(
        {"zero_optimization": {"stage": 1}},
        precision="float32",
        micro_batch_size=MICRO,
        accumulation_steps=-(-slice_size // MICRO),
        world_size=world.world_size,
        clip_grad_norm=CLIP,
        num_parameters=sum(parameter.numel() for parameter in objective.parameters()),
        optimizer="adamw",
    )
    engine = ZeroEngine(
        objective, build_optimizer=partial(make_optimizer), config=config, world=world, build_average=None
    )
    losses = []
    for step in range(STEPS):
        parts = micro_batches_of(global_batch(step, BATCH), world.rank, world.world_size, MICRO)
        count = sum_over_ranks(torch.tensor(sum(objective.count(part) for part in parts)))
        sums = Sums(engine.device)
        for part in parts:
            loss_sum, _ = engine.forward(*mixed(case, part))
            engine.backward(loss_sum / count)
            sums.add(loss=loss_sum)
        engine.step(LRS[step])
        losses.append(sums.over_ranks()["loss"] / float(count))
    return losses


def main() -> None:
    world = join(timeout_seconds=60)
    found = {case: losses_of(case, world) for case in CASES}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
