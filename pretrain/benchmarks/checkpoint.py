"""What a checkpoint costs training: the stall of a save beside training and of a synchronous one, the steps meanwhile.

The state is of a ViT's size, weights and AdamW's moments in float32; the network itself is not built. `stall` is what
the training loop waits for a save (the copy; warm: not the first one). `slowdown` is the time of steps of a small ViT,
on the same machine, while a checkpoint is written, over their time while none is: without a limit of the rate and with
--limit. Memory: the state twice, for the copy, and once more for the synchronous save. Nothing is left in --folder.

  pretrain benchmark checkpoint --folder /disk
  pretrain benchmark checkpoint --size base --limit 100e6 --json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.arguments.benchmark_checkpoint import PATCH
from pretrain.checkpoint.manifest import KINDS
from pretrain.checkpoint.save import save_checkpoint
from pretrain.checkpoint.saver import Saver
from pretrain.distributed import World
from pretrain.engine.fragments import Fragment
from pretrain.errors import UsageError
from pretrain.formats.naming import backbone_shapes
from pretrain.metrics.reporter import Reporter
from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec

MEAN_STD = (0.5, 0.5, 0.5)
_TURNS = 2  # of each kind of save: at full size each writes gigabytes
_MOST_STEP_SECONDS = 20.0  # of one turn of steps


def run(args: argparse.Namespace) -> int:
    if args.limit <= 0:
        raise UsageError(f"--limit must be positive: got {args.limit:g}")
    shapes = {name: list(shape) for name, shape in backbone_shapes(_spec(args.size)).items()}
    state_bytes = 4 * len(KINDS) * sum(math.prod(shape) for shape in shapes.values())
    _check_memory(3 * state_bytes, args.size)
    if args.folder is not None and not args.folder.is_dir():
        raise UsageError(f"--folder {args.folder}: there is no such folder")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.folder))
    try:
        found = measure(shapes, folder, limit=args.limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(found))
        return 0
    width = max(len(name) for name in found)
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<{width}}  {value:,.3f}")
    return 0


def _spec(size: str) -> BackboneSpec:
    model = {
        "name": "vit",
        "size": size,
        "patch_size": PATCH[size],
        "image_size": 224,
        "pooling": "cls",
        "position_embedding": "learned",
    }
    return BackboneSpec.of_recipe(model, {"mean": MEAN_STD, "std": MEAN_STD})


def _check_memory(needed: int, size: str) -> None:
    """Raises UsageError when this machine has not so much to give: it would swap, or be killed."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024 * int(line.split()[1])
    except (OSError, ValueError):  # not Linux: nobody knows
        return
    if free < needed:
        raise UsageError(
            f"--size {size} takes about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are available; take a "
            "smaller one"
        )


class _State:
    """What an engine holds of a network, without the network."""

    zero_stage = 1
    optimizer_steps = 0

    def __init__(self, shapes: dict[str, list[int]], device: torch.device) -> None:
        self.device = device
        self.module: Any = nn.ParameterDict()  # the names and shapes alone
        with torch.device("meta"):
            for name, shape in shapes.items():
                self.module[name.replace(".", "/")] = nn.Parameter(torch.empty(shape))
        noise = torch.randn(1 << 20, device=device)
        self._fragments = []
        for name, shape in shapes.items():
            tensors = {kind: _filled(math.prod(shape), noise) for kind in KINDS}
            self._fragments.append(Fragment(name=name.replace(".", "/"), start=0, tensors=tensors))

    def owned_fragments(self) -> list[Fragment]:
        return self._fragments


def _filled(count: int, noise: torch.Tensor) -> torch.Tensor:
    tensor = torch.empty(count, device=noise.device)
    for start in range(0, count, len(noise)):
        part = tensor[start : start + len(noise)]
        part.copy_(noise[: len(part)])
    return tensor


def measure(shapes: dict[str, list[int]], folder: Path, *, limit: float) -> dict[str, float]:
    """Seconds and ratios by name. Writes six checkpoints into `folder`, two of which are there at a time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(rank=0, local_rank=0, world_size=1, device=device, launched=False)
    state: Any = _State(shapes, device)
    facts = {"samples": 0, "attempt": 1, "config": {}, "dataset": {}, "order": {}}
    given = {"optimizer_steps": 0, "world_size": 1, "zero_stage": 1, "parameters": _shapes(state)}

    synchronous = []
    for turn in range(_TURNS):
        began = time.perf_counter()
        save_checkpoint(
            folder / "sync",
            state.owned_fragments(),
            world=world,
            keep_last=1,
            facts={**facts, **given, "step": turn},
        )
        synchronous.append(time.perf_counter() - began)
    shutil.rmtree(folder / "sync")

    take_step = _small_training(device)
    reporter = Reporter(journal=None, progress=None, server=None, log_every_steps=1, total_steps=1)
    settings: Any = {"world": world, "attempt": 1, "reporter": reporter, "keep_last": 1}
    stalls, written, beside = [], [], []
    alone = _steps_until(take_step, lambda: False, most_seconds=_MOST_STEP_SECONDS / 2)
    with Saver(folder, state, **settings) as saver:
        for turn in range(_TURNS + 1):
            began = time.perf_counter()
            saver.save({**facts, "step": turn}, wait=False)
            stalls.append(time.perf_counter() - began)
            if turn:
                beside += _steps_until(take_step, lambda turn=turn: _is_there(folder, turn, saver))  # type: ignore[misc]
            assert saver.wait() is None, "the save went through"
            written.append(time.perf_counter() - began)
    with Saver(folder, state, max_bytes_per_second=limit, **settings) as saver:
        saver.save({**facts, "step": 11}, wait=False)
        beside_limited = _steps_until(take_step, lambda: _is_there(folder, 11, saver))
    alone += _steps_until(take_step, lambda: False, most_seconds=_MOST_STEP_SECONDS / 2)

    stall, sync = statistics.median(stalls[1:]), statistics.median(synchronous)
    step = statistics.fmean(alone)
    return {
        "gigabytes": 4e-9 * len(KINDS) * sum(math.prod(shape) for shape in shapes.values()),
        "synchronous_seconds": sync,
        "first_stall_seconds": stalls[0],
        "warm_stall_seconds": stall,
        "stall_over_synchronous": stall / sync,
        "written_after_seconds": statistics.median(written[1:]),
        "step_seconds": step,
        "slowdown_while_writing": statistics.fmean(beside) / step,
        "limit_megabytes_per_second": limit / 1e6,
        "slowdown_while_writing_limited": statistics.fmean(beside_limited) / step,
    }


def _shapes(state: _State) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in state.module.named_parameters()}


def _is_there(folder: Path, step: int, saver: Saver) -> bool:
    saver.poll()
    return (folder / "checkpoints" / f"step-{step:08d}").exists()


def _small_training(device: torch.device) -> Callable[[], None]:
    """A step of a ViT of 2 blocks, that takes some tens of milliseconds of all cores."""
    torch.manual_seed(0)
    spec = BackboneSpec(
        image_size=64, patch_size=8, embed_dim=192, depth=2, num_heads=3, mean=MEAN_STD, std=MEAN_STD
    )
    backbone = build_backbone(spec).to(device)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-4)
    images = torch.randn(8, 3, 64, 64, device=device)

    def take_step() -> None:
        backbone.features(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(5):
        take_step()
    return take_step


def _steps_until(
    take_step: Callable[[], None], done: Callable[[], bool], *, most_seconds: float = _MOST_STEP_SECONDS
) -> list[float]:
    """Seconds of each step until `done()`, or for so long at most."""
    seconds: list[float] = []
    deadline = time.perf_counter() + most_seconds
    while not seconds or not (done() or time.perf_counter() > deadline):
        began = time.perf_counter()
        take_step()
        seconds.append(time.perf_counter() - began)
    return seconds
