"""What several stages of run.py are made of: recipes, networks, batches, an engine and its step.

Backbones and objectives are those that the schema names, so that a new one is tried without a line here (but for a
small size of it, in SMALL_MODELS and TINY_MODELS).
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from typing import Any, get_args

import torch

from pretrain.config.load import parse_config
from pretrain.config.schema import ModelConfig, ObjectiveConfig, RunConfig

CLASSES = 10

# A backbone's `model` keys at its smallest useful size; "image_size" is put in by the stage.
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "vit": {"size": "tiny", "patch_size": 16},
    "swin": {"size": "tiny"},
    "swin_v2": {"size": "tiny"},
    "pvt": {"size": "b0"},
}
# The same at a size that compiles in seconds: few kinds of blocks, for images of 32 pixels.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8},
    "swin": {"embed_dim": 32, "depths": [2, 1], "stage_heads": [1, 2], "window_size": 4},
    "swin_v2": {"embed_dim": 32, "depths": [2, 1], "stage_heads": [1, 2], "window_size": 4},
    "pvt": {"embed_dims": [32, 64], "depths": [1, 1], "stage_heads": [1, 2], "sr_ratios": [2, 1]}
    | {"mlp_ratios": [4.0, 4.0]},
}
# What a ViT may have besides: each goes through other code.
VIT_VARIANTS: dict[str, dict[str, Any]] = {
    # of a size that lets the branches count from the first step
    "registers and LayerScale": {"num_registers": 4, "layer_scale_init": 0.5},
    "QK-norm": {"qk_norm": True},
    "SwiGLU": {"mlp": "swiglu"},
    "rotary positions": {"position_embedding": "rope"},
    "sincos positions, average": {"position_embedding": "sincos", "pooling": "avg"},
    "attention pooling": {"pooling": "map"},
    "batch_subset": {"drop_path_mode": "batch_subset", "drop_path_rate": 0.4},
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


def small_objective(name: str) -> dict[str, Any]:
    """The section `objective`, with a small decoder where it has one."""
    decoder = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
    return {"name": name, **(decoder if name == "mae" else {})}


def batch_of(
    count: int, side: int, device: torch.device, *, classes: int = CLASSES
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Images with as much structure as labels need to be told apart, and the rest of a batch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.randn(count, 3, side, side, generator=generator) + 0.3 * labels[:, None, None, None]
    batch = {"labels": labels, "weights": torch.ones(count), "positions": torch.arange(count)}
    return images.to(device), {name: tensor.to(device) for name, tensor in batch.items()}


def backend(args: argparse.Namespace) -> str:
    return "aot_eager" if args.small else "inductor"  # a CPU's compiler takes longer than all the rest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_alone() -> Any:
    """This process as the one rank of a launched run."""
    from pretrain.distributed import join

    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **here)
    return join()


def joined() -> Any:
    """The world of a process that has joined already: after a batch that did not fit."""
    from pretrain.distributed import World

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return World(rank=0, local_rank=0, world_size=1, device=device, launched=True)


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
