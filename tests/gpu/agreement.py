"""Stages of run.py that hold numbers against each other: bf16 and float32, ZeRO and none, compiled and eager."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from gpu.parts import (
    CLASSES,
    SMALL_MODELS,
    TINY_MODELS,
    VIT_VARIANTS,
    backend,
    batch_of,
    config_of,
    join_alone,
    kinds_of,
    small_objective,
    training,
)

from pretrain.config.schema import ModelConfig, ObjectiveConfig
from pretrain.errors import ConfigError


def precision(args: argparse.Namespace) -> dict[str, Any]:
    """bf16 against float32 on one batch, for every backbone, objective and variant of a ViT: the loss and the
    gradient's direction.
    """
    device, side = torch.device(args.device), 64 if args.small else 224
    count, found, undefined, failures = 4 if args.small else 16, {}, {}, []
    for backbone in kinds_of(ModelConfig):
        assert backbone in SMALL_MODELS, f"no small size of {backbone} is known here: add one to SMALL_MODELS"
    plain = {"image_size": side, "drop_path_rate": 0.1}
    models = {name: {"name": name, **plain, **SMALL_MODELS[name]} for name in kinds_of(ModelConfig)}
    models |= {
        f"vit with {name}": {**plain, **TINY_MODELS["vit"], "patch_size": 16, **variant}
        for name, variant in VIT_VARIANTS.items()
    }
    for backbone, model in models.items():
        for objective in kinds_of(ObjectiveConfig):
            name = f"{backbone} {objective}"
            try:
                found[name] = bf16_beside_float32(model, objective, device=device, side=side, count=count)
            except ConfigError as error:
                undefined[name] = str(error)
                continue
            off, cosine = found[name]["loss_off"], found[name]["gradient_cosine"]
            if not (off < 0.02 and cosine > 0.97):
                failures.append(f"{name}: bf16's loss is {off:.2%} off, the gradients' cosine {cosine:.4f}")
    assert found, f"nothing was defined: {undefined}"
    return {"compared": len(found), "pairs": found, "not_defined": undefined, "failures": failures}


def bf16_beside_float32(
    model: dict[str, Any], objective: str, *, device: torch.device, side: int, count: int
) -> dict[str, float]:
    """Raises ConfigError where the schema or a constructor refuses the pair."""
    from pretrain.assemble import build_objective

    config = config_of(model=model, objective=small_objective(objective))
    exact = build_objective(config, num_classes=CLASSES).to(device)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    images, batch = batch_of(count, side, device)
    losses, gradients = [], []
    for module in (exact, rounded):
        loss, _ = module(images, batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.double().flatten() for p in module.parameters()]))
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0).item()
    off = abs(losses[1] - losses[0]) / abs(losses[0])
    return {"float32_loss": losses[0], "loss_off": off, "gradient_cosine": cosine}


def zero(args: argparse.Namespace) -> dict[str, Any]:
    """Ten steps on one batch: ZeRO-1 in bf16, eager and compiled, against float32 without DeepSpeed; of a ViT as it is
    used, and of tiny networks of every backbone and objective.
    """
    from pretrain.distributed import World, leave

    alone = World(rank=0, local_rank=0, world_size=1, device=torch.device(args.device), launched=False)
    launched = join_alone()
    cases: dict[str, tuple[dict[str, Any], str]] = {}
    if not args.small:
        cases["vit small classification"] = {"size": "small", "image_size": 224}, "classification"
    for backbone in kinds_of(ModelConfig):
        assert backbone in TINY_MODELS, f"no tiny size of {backbone} is known here: add one to TINY_MODELS"
        for objective in kinds_of(ObjectiveConfig):
            model = {"name": backbone, "image_size": 32, "drop_path_rate": 0.1, **TINY_MODELS[backbone]}
            cases[f"tiny {backbone} {objective}"] = model, objective
    curves, undefined = {}, {}
    for name, (model, objective) in cases.items():
        try:
            curves[name] = curves_of(args, model, objective, alone=alone, launched=launched)
        except ConfigError as error:
            undefined[name] = str(error)
    leave()
    assert curves, f"nothing was defined: {undefined}"
    return {"compared": len(curves), "losses": curves, "not_defined": undefined}


def curves_of(
    args: argparse.Namespace, model: dict[str, Any], objective: str, *, alone: Any, launched: Any
) -> dict[str, list[float]]:
    """Ten losses of each way to train. Raises ConfigError where the schema refuses the pair."""
    from pretrain.engine.compiled import compile_blocks

    curves = {}
    # of images of 32 pixels masked squares of the usual 32 would be all of it
    section = small_objective(objective) | ({"mask_patch_size": 8} if objective == "simmim" else {})
    for name, world, kind, compiled in (
        ("float32", alone, "float32", False),
        ("zero1 bf16", launched, "bf16", False),
        ("zero1 bf16 compiled", launched, "bf16", True),
    ):
        config = config_of(
            model=model,
            objective=section,
            train={"global_batch_size": 16, "steps": 10, "precision": kind, "compile": compiled},
        )
        engine, step = training(config, world, side=config.model.image_size)
        optimizer = engine._optimizer if world is alone else engine._shards.optimizer
        fused = [group["fused"] for group in optimizer.param_groups]
        assert fused == [args.device == "cuda"] * len(fused), f"AdamW's `fused` is {fused} on {args.device}"
        if compiled:
            compile_blocks(engine.module, backend=backend(args))
        curves[name] = [step(3e-4) for _ in range(10)]
        assert curves[name][-1] < curves[name][0], f"{name} does not learn: {curves[name]}"
    for name in ("zero1 bf16", "zero1 bf16 compiled"):
        off = max(abs(a - b) / b for a, b in zip(curves[name], curves["float32"], strict=True))
        assert off < 0.05, f"{name} is {off:.2%} off float32: {curves}"
    return curves
