"""One rank of test_teacher: trains tests/objectives/self_distillation.py in each case asked for, and goes on from it.

Started by torch's launcher variables; writes what rank 0 saw to the file named on the command line.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zero_worker
from objectives.self_distillation import SelfDistillation
from zero_worker import CLIP, EMA_DECAY, IMAGE, LRS, PATCH, gather, global_batch, micro_batches_of

from pretrain.checkpoint.load import CheckpointReader, load_fragments
from pretrain.checkpoint.save import save_checkpoint
from pretrain.data.order import slice_batch
from pretrain.distributed import Sums, World, gather_objects, join, leave
from pretrain.engine.base import parameter_shapes
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.errors import UsageError, exit_code_kept
from pretrain.metrics.compute_time import ComputeTime
from pretrain.models.vit import VisionTransformer
from pretrain.optim.ema import WeightAverage
from pretrain.pulse import Pulse
from pretrain.steps import take_step

STEPS, BAD_STEP, MORE_STEPS = 6, 2, 2
BATCH = 18  # 9 pairs: slices of 10 and 8 on two ranks, of 6 on three


def make_objective() -> SelfDistillation:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        image_size=IMAGE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.1
    )
    return SelfDistillation(backbone, seed=5, local_side=IMAGE // 2)


def build_engine(world: World, *, stage: int, precision: str, micro: int, ema: bool = True) -> ZeroEngine:
    objective = make_objective()
    slice_size = len(slice_batch(torch.arange(BATCH).numpy(), rank=0, world_size=world.world_size))
    config = deepspeed_config(
        {"zero_optimization": {"stage": stage}},
        precision=precision,
        micro_batch_size=micro,
        accumulation_steps=-(-slice_size // micro),
        world_size=world.world_size,
        clip_grad_norm=CLIP,
        num_parameters=sum(parameter.numel() for parameter in objective.parameters()),
    )
    return ZeroEngine(
        objective,
        build_optimizer=zero_worker.make_optimizer,
        config=config,
        world=world,
        build_average=partial(WeightAverage, decay=EMA_DECAY, warmup=False) if ema else None,
    )


def step(engine: Any, number: int, *, rank: int, world_size: int, micro: int, wrong: bool = False) -> float:
    """One of train.py's own steps; the loss. wrong: an image of the last rank is not a number."""
    batches = micro_batches_of(global_batch(number, BATCH), rank, world_size, micro)
    if wrong and rank == world_size - 1:
        batches[0]["images"][0] = float("nan")
    sums = Sums(engine.device)
    take_step(
        engine,
        batches,
        lambda b: (b["images"], dict(b)),
        lr=LRS[number],
        sums=sums,
        pulse=Pulse(),
        compute=ComputeTime(engine.device),
    )
    totals = sums.over_ranks()
    return totals["loss"] / totals["count"]


def digest(teacher: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, parameter in teacher.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def is_the_average(engine: ZeroEngine) -> bool:
    """Is this rank's teacher, to the last bit, the average that all ranks hold together, rounded as it is?"""
    average = gather(engine, "ema")
    held = dict(engine.module.teacher.named_parameters())
    assert held.keys() == average.keys()
    return all(torch.equal(p.view(-1), average[name].to(p.dtype)) for name, p in held.items())


def run_case(world: World, folder: Path, *, stage: int, precision: str, micro: int) -> dict[str, Any]:
    """Steps of which one is left out, a look at the average, a checkpoint, and steps after it."""
    engine = build_engine(world, stage=stage, precision=precision, micro=micro)
    teacher = engine.module.teacher
    where = {"rank": world.rank, "world_size": world.world_size, "micro": micro}
    fresh = dict(make_objective().named_parameters())
    begins = all(torch.equal(p, fresh[name].to(p.dtype)) for name, p in teacher.named_parameters())
    told: dict[str, list] = {"losses": [], "is the average": [is_the_average(engine)], "teachers": []}
    told["teachers"].append(digest(teacher))
    skipped = []
    for number in range(STEPS):
        told["losses"].append(step(engine, number, wrong=number == BAD_STEP, **where))
        skipped.append(engine.skipped)
        told["is the average"].append(is_the_average(engine))
        told["teachers"].append(digest(teacher))
    with engine.averaged_weights():
        in_the_average = digest(teacher)
    saved = save_checkpoint(
        folder,
        engine.owned_fragments(),
        world=world,
        keep_last=1,
        facts={
            "step": STEPS,
            "samples": STEPS * BATCH,
            "optimizer_steps": engine.optimizer_steps,
            "attempt": 1,
            "world_size": world.world_size,
            "zero_stage": stage,
            "config": {},
            "dataset": {},
            "order": {},
            "parameters": parameter_shapes(engine.module),
        },
    )
    return {
        **told,
        "teachers of ranks": gather_objects(told["teachers"]),
        "is the average on ranks": gather_objects(told["is the average"]),
        "skipped": [number for number, was in enumerate(skipped) if was],
        "while the average is used": in_the_average,
        "dtype": str(next(teacher.parameters()).dtype),
        "begins as the weights": begins,
        "checkpoint": str(saved.path),
        "parameters": sorted(CheckpointReader(saved.path).manifest.parameters),
        "more losses": [step(engine, STEPS + more, **where) for more in range(MORE_STEPS)],
    }


def go_on(world: World, checkpoint: Path, *, stage: int, precision: str, micro: int) -> dict[str, Any]:
    engine = build_engine(world, stage=stage, precision=precision, micro=micro)
    where = {"rank": world.rank, "world_size": world.world_size, "micro": micro}
    reader = CheckpointReader(checkpoint)
    load_fragments(reader, engine.fragments())
    engine.optimizer_steps = reader.manifest.optimizer_steps
    engine.publish_weights()
    return {
        "teachers of ranks": gather_objects(digest(engine.module.teacher)),
        "is the average": is_the_average(engine),
        "more losses": [step(engine, STEPS + more, **where) for more in range(MORE_STEPS)],
    }


def refusal(world: World, **case: Any) -> str | None:
    try:
        build_engine(world, **case)
    except UsageError as error:
        return str(error)
    return None


def main() -> None:
    out, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = join(timeout_seconds=60)
    results: dict[str, Any] = {
        name: run_case(world, out.parent / name.replace(" ", "-"), **case)
        for name, case in work.get("cases", {}).items()
    }
    for name, (checkpoint, case) in work.get("go on", {}).items():
        results[name] = go_on(world, Path(checkpoint), **case)
    for name, case in work.get("refused", {}).items():
        results[name] = refusal(world, **case)
    if world.is_main:
        out.write_text(json.dumps(results))
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
