"""The stages of run.py, one a process: `stages.py NAME RESULT.json`. A failed check is an AssertionError.

Backbones and objectives are those that the schema names, so that a new one is tried without a line here (but
for a small size of it, in SMALL_MODELS).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch

from pretrain.config.load import parse_config
from pretrain.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from pretrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 10

# A backbone's `model` keys at its smallest useful size; "image_size" is put in by the stage.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "vit": {"size": "tiny", "patch_size": 16},
    "swin": {"size": "tiny"},
    "pvt": {"size": "b0"},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_large_patch16": {"size": "large", "patch_size": 16},
    "vit_huge_patch14": {"size": "huge", "patch_size": 14},
    "mae_large_patch16": {"size": "large", "patch_size": 16, "position_embedding": "sincos"},
}
TIMM_NAMES = {
    "vit_large_patch16": "vit_large_patch16_224",
    "vit_huge_patch14": "vit_huge_patch14_224",
    "mae_large_patch16": "vit_large_patch16_224",
}
BATCH_SIZES = {
    "vit_large_patch16": (128, 64),
    "vit_huge_patch14": (96, 64, 32),
    "mae_large_patch16": (256, 128),
}


def config_of(**sections: dict[str, Any]) -> RunConfig:
    """A recipe with the given sections, on data that is never opened."""
    recipe = {
        "run_dir": "run",
        "data": {"train": "shards"},
        "train": {"global_batch_size": 8, "steps": 10, "precision": "float32"},
        **sections,
    }
    return parse_config(recipe, source="tests/gpu")


def kinds_of(section: type[ModelConfig | ObjectiveConfig]) -> tuple[str, ...]:
    """What the schema lets `name` be."""
    return get_args(section.model_fields["name"].annotation)


def batch_of(
    count: int, side: int, device: torch.device, *, classes: int = CLASSES
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images with as much structure as labels need to be told apart, and the rest of a batch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.randn(count, 3, side, side, generator=generator) + 0.3 * labels[:, None, None, None]
    batch = {"labels": labels, "weights": torch.ones(count), "positions": torch.arange(count)}
    return images.to(device), {name: tensor.to(device) for name, tensor in batch.items()}


# --- machine ----------------------------------------------------------------------------------------------------------


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


# --- precision --------------------------------------------------------------------------------------------------------


def precision(args: argparse.Namespace) -> dict[str, Any]:
    """bf16 against float32 on one batch, for every backbone and objective: the loss and the gradient's direction."""
    from pretrain.assemble import build_objective

    device, side = torch.device(args.device), 64 if args.small else 224
    count, found, undefined, failures = 4 if args.small else 16, {}, {}, []
    for backbone in kinds_of(ModelConfig):
        assert backbone in SMALL_MODELS, f"no small size of {backbone} is known here: add one to SMALL_MODELS"
        for objective in kinds_of(ObjectiveConfig):
            name = f"{backbone} {objective}"
            chosen: dict[str, Any] = {"name": objective}
            if objective == "mae":
                chosen |= {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
            try:
                model = {"name": backbone, "image_size": side, "drop_path_rate": 0.1}
                config = config_of(model={**model, **SMALL_MODELS[backbone]}, objective=chosen)
                exact = build_objective(config, num_classes=CLASSES).to(device)
            except ConfigError as error:
                undefined[name] = str(error)
                continue
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
            found[name] = {"float32_loss": losses[0], "loss_off": off, "gradient_cosine": cosine}
            if not (off < 0.02 and cosine > 0.97):
                failures.append(f"{name}: bf16's loss is {off:.2%} off, the gradients' cosine {cosine:.4f}")
    assert found, f"nothing was defined: {undefined}"
    return {"compared": len(found), "pairs": found, "not_defined": undefined, "failures": failures}


# --- ZeRO-1 on one device, compiled and eager ------------------------------------------------------------------------


def zero(args: argparse.Namespace) -> dict[str, Any]:
    """Ten steps on one batch: ZeRO-1 in bf16, eager and compiled, against float32 without DeepSpeed."""
    from pretrain.distributed import World, leave
    from pretrain.engine.compiled import compile_blocks

    side = 32 if args.small else 224
    model = (
        {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8} if args.small else {"size": "small"}
    )
    alone = World(rank=0, local_rank=0, world_size=1, device=torch.device(args.device), launched=False)
    launched = join_alone()
    curves = {}
    for name, world, kind, compiled in (
        ("float32", alone, "float32", False),
        ("zero1 bf16", launched, "bf16", False),
        ("zero1 bf16 compiled", launched, "bf16", True),
    ):
        config = config_of(
            model={**model, "image_size": side},
            train={"global_batch_size": 16, "steps": 10, "precision": kind, "compile": compiled},
        )
        engine, step = training(config, world, side=side)
        if compiled:
            compile_blocks(engine.module, backend=backend(args))
        curves[name] = [step(3e-4) for _ in range(10)]
        assert curves[name][-1] < curves[name][0], f"{name} does not learn: {curves[name]}"
    leave()
    for name in ("zero1 bf16", "zero1 bf16 compiled"):
        off = max(abs(a - b) / b for a, b in zip(curves[name], curves["float32"], strict=True))
        assert off < 0.05, f"{name} is {off:.2%} off float32: {curves}"
    return {"losses": curves}


def backend(args: argparse.Namespace) -> str:
    return "aot_eager" if args.small else "inductor"  # a CPU's compiler takes longer than all the rest


def join_alone() -> Any:
    """This process as the one rank of a launched run."""
    from pretrain.distributed import join

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **here)
    return join()


def training(
    config: RunConfig, world: Any, *, side: int, classes: int = CLASSES
) -> tuple[Any, Callable[[float], float]]:
    """(an engine, its step at a rate on one batch, which returns the loss): train.py's own step, without a loader."""
    from pretrain.assemble import build_engine, build_objective
    from pretrain.derived import split_batch
    from pretrain.distributed import Sums
    from pretrain.metrics.compute_time import ComputeTime
    from pretrain.pulse import Pulse
    from pretrain.steps import take_step

    objective = build_objective(config, num_classes=classes)
    engine = build_engine(config, objective, world=world, split=split_batch(config, 1))
    count = config.train.global_batch_size
    ready = batch_of(count, side, engine.device, classes=classes)
    on_host = {name: tensor.cpu() for name, tensor in ready[1].items()}
    pulse, compute = Pulse(), ComputeTime(engine.device)

    def step(lr: float) -> float:
        sums = Sums(engine.device)
        take_step(engine, [on_host], lambda _: ready, lr=lr, sums=sums, pulse=pulse, compute=compute)  # type: ignore[list-item]
        totals = sums.over_ranks()
        return totals["loss"] / totals["count"]

    return engine, step


# --- the whole line --------------------------------------------------------------------------------------------------


def learns(args: argparse.Namespace) -> dict[str, Any]:
    """200 steps of `pretrain train` as one rank of ZeRO-1, from packed images, compiled: the loss falls."""
    steps, side = (40, 32) if args.small else (200, 96)
    data = args.photographs
    if data is None:
        samples = "256" if args.small else "4000"
        pretrain("data", "synth", "images", "--samples", samples, "--image-size", str(side), "--classes", "8")
        pretrain("data", "pack", "images", "shards")
        data = "shards"
    recipe = {
        "run_dir": "run",
        "model": {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8, "image_size": side}
        if args.small
        else {"size": "small", "patch_size": 16, "image_size": side if args.photographs is None else 224},
        # photographs need no labels
        "objective": {"name": "classification" if args.photographs is None else "mae"},
        "data": {"train": data, "workers": 1 if args.small else 8},
        "train": {
            "global_batch_size": 32 if args.small else 128,
            "steps": steps,
            "precision": "bf16",
            "compile": not args.small,
        },
        "optim": {"lr": 1e-3, "warmup_steps": steps // 10},
        "checkpoint": {"every_steps": steps},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    join_alone_for_children = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    pretrain("train", "recipe.yaml", **join_alone_for_children, MASTER_PORT=str(free_port()))
    lines = [json.loads(line) for line in Path("run/journal.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert len(losses) == steps, f"{len(losses)} steps in the journal, not {steps}"
    part = max(1, steps // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    assert last < 0.95 * first, f"the loss went from {first} to {last}"
    return {"steps": steps, "first_loss": first, "last_loss": last, "losses": losses[:: max(1, steps // 50)]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pretrain(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, (
        f"pretrain {' '.join(arguments)} ended with {done.returncode}: {done.stdout[-2000:]}"
    )


# --- speed -----------------------------------------------------------------------------------------------------------


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


def joined() -> Any:
    """The world of a process that has joined already: after a batch that did not fit."""
    from pretrain.distributed import World

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return World(rank=0, local_rank=0, world_size=1, device=device, launched=True)


def timm_step(args: argparse.Namespace, network: str, config: RunConfig) -> Callable[[], float]:
    """timm's network in torch.compile, as its users train it: float32 weights under autocast, fused AdamW."""
    timm = import_timm()
    device, side, count = torch.device(args.device), config.model.image_size, config.train.global_batch_size
    is_mae = network.startswith("mae")
    sizes = (
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2} if args.small else {}
    )
    classes = 0 if is_mae else 1000
    more = {"patch_drop_rate": config.objective.mask_ratio} if is_mae else {}
    backbone = timm.create_model(TIMM_NAMES[network], num_classes=classes, **sizes, **more)
    module: torch.nn.Module = TimmMAE(backbone, config) if is_mae else backbone
    module = module.to(device).train()
    compiled = torch.compile(module, backend=backend(args))
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-4, weight_decay=0.05, fused=device.type == "cuda"
    )
    images, batch = batch_of(count, side, device, classes=1000)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            output = compiled(images)
            loss = output if is_mae else torch.nn.functional.cross_entropy(output, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def import_timm() -> Any:
    """timm, which imports torchvision where there is one: also where its binary is for another torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # timm does without
    except RuntimeError:  # its operators are missing; declared they are enough, for nothing here calls them
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    import timm

    return timm


_KEPT: list[Any] = []  # an operator goes with the library object that declared it


class TimmMAE(torch.nn.Module):
    """A masked autoencoder of timm's parts: its ViT with dropped patches, its blocks as decoder.

    It does the work of one, for speed; which patches were dropped is not told, so the rest stands in order.
    """

    def __init__(self, backbone: Any, config: RunConfig) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.backbone, E = backbone, config.objective.decoder_dim
        self.patch = backbone.patch_embed.patch_size[0]
        tokens = backbone.patch_embed.num_patches + 1
        self.embed = torch.nn.Linear(backbone.embed_dim, E)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, E))
        self.positions = torch.nn.Parameter(torch.zeros(1, tokens, E))
        depth, heads = config.objective.decoder_depth, config.objective.decoder_heads
        self.blocks = torch.nn.ModuleList(Block(E, heads, qkv_bias=True) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(E)
        self.pred = torch.nn.Linear(E, 3 * self.patch**2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(self.backbone.forward_features(images))
        missing = self.positions.shape[1] - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), missing, -1)], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        predicted = self.pred(self.norm(x))[:, 1:]
        p, (B, C, H, W) = self.patch, images.shape
        target = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        return (predicted.float() - target).square().mean(-1)[:, -missing:].mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--photographs")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    assert args.device == "cpu" or torch.cuda.is_available(), "torch sees no CUDA device"
    stage, *rest = args.name.split()
    plain: dict[str, Callable[..., dict[str, Any]]] = {
        "machine": machine,
        "precision": precision,
        "zero": zero,
        "learns": learns,
        "speed": speed,
    }
    result = plain[stage](args, *rest)
    args.out.write_text(json.dumps({"result": result}))
    assert not result.get("failures"), result["failures"]


if __name__ == "__main__":
    main()
