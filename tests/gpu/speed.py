"""Stages of run.py that measure: what the machine can do, and whole training steps beside timm's."""

from __future__ import annotations

import argparse
import contextlib
import gc
import platform
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from gpu.parts import backend, config_of, join_alone, joined, training
from gpu.timm_side import timm_step

from pretrain.config.schema import RunConfig

NETWORKS: dict[str, dict[str, Any]] = {
    "vit_large_patch16": {"size": "large", "patch_size": 16},
    "vit_huge_patch14": {"size": "huge", "patch_size": 14},
    "mae_large_patch16": {"size": "large", "patch_size": 16, "position_embedding": "sincos"},
}
BATCH_SIZES = {
    "vit_large_patch16": (128, 64),
    "vit_huge_patch14": (96, 64, 32),
    "mae_large_patch16": (256, 128),
}


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What this is, and what it can do at best: the rate of a bf16 product, and of a copy."""
    device, side = torch.device(args.device), 256 if args.small else 8192
    versions = {}
    for package in ("deepspeed", "accelerate", "timm", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = best_seconds(lambda: a @ b, device, repeats=3 if args.small else 30)
    source = torch.empty(2**20 if args.small else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = best_seconds(lambda: target.copy_(source), device, repeats=10)
    return {
        "name": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
        "matmul_side": side,
        "bf16_matmul_flops": 2 * side**3 / seconds,
        "copy_bytes_per_second": 2 * source.numel() / copying,
    }


def best_seconds(run: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(3):
        wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            run()
        wait(device)
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(args: argparse.Namespace, network: str, who: str) -> dict[str, Any]:
    """Images a second of whole training steps on one batch in the device's memory; the largest batch that fits."""
    from pretrain.cost import cost_of

    failed: list[int] = []
    step: Callable[[], float] | None
    for count in (4,) if args.small else BATCH_SIZES[network]:
        config = speed_config(args, network, count, compiled=who != "eager")
        try:
            step = (timm_step if who == "timm" else our_step)(args, network, config)
            warm, timed = (1, 2) if args.small else (6, 20)
            losses = [step() for _ in range(warm)]
            began = [time.perf_counter()]
            for _ in range(timed):
                losses.append(step())
                began.append(time.perf_counter())
        except torch.OutOfMemoryError:
            failed.append(count)
            step = None
            gc.collect()
            torch.cuda.empty_cache()
            continue
        seconds = sorted(b - a for a, b in pairwise(began))
        assert all(loss == loss for loss in losses), f"the loss is not a number: {losses}"
        on_gpu = args.device == "cuda"
        return {
            "images_per_second": count * timed / (began[-1] - began[0]),
            "median_step_seconds": seconds[len(seconds) // 2],
            "batch_size": count,
            "out_of_memory_at": failed,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "training_flops": cost_of(config, 1000).training_flops,
            "losses": losses[:2] + losses[-2:],
        }
    raise AssertionError(f"out of memory at every batch size: {failed}")


def speed_config(args: argparse.Namespace, network: str, count: int, *, compiled: bool) -> RunConfig:
    model, side = NETWORKS[network], 32 if args.small else 224
    if args.small:
        model = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}
    is_mae = network.startswith("mae")
    small_decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2} if args.small else {}
    return config_of(
        model={**model, "image_size": side},
        objective={"name": "mae", **small_decoder} if is_mae else {"name": "classification"},
        train={"global_batch_size": count, "steps": 10, "precision": "bf16", "compile": compiled},
    )


def our_step(args: argparse.Namespace, network: str, config: RunConfig) -> Callable[[], float]:
    """The engine of a launched run, ZeRO-1 in bf16 with float32 masters; one rank."""
    from pretrain.engine.compiled import compile_blocks

    world = join_alone() if not torch.distributed.is_initialized() else joined()
    engine, step = training(config, world, side=config.model.image_size, classes=1000)
    if config.train.compile:
        compile_blocks(engine.module, backend=backend(args))
    return lambda: step(1e-4)
