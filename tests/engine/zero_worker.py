"""One rank of test_zero_equals_plain_pytorch: trains a small ViT for ten steps, in each case asked for.

Started by torch's launcher variables; writes what rank 0 saw to the file named on the command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pretrain.checkpoint.load import CheckpointReader, load_fragments
from pretrain.checkpoint.manifest import KINDS
from pretrain.checkpoint.save import save_checkpoint
from pretrain.data.order import slice_batch
from pretrain.distributed import Sums, join, sum_over_ranks
from pretrain.engine.base import parameter_shapes
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.optim.parameter_groups import parameter_groups

IMAGE, PATCH, CLASSES, STEPS = 16, 4, 7, 10
LRS = [1e-3 * (step + 1) / STEPS for step in range(STEPS)]
WEIGHT_DECAY, CLIP = 0.1, 1.0


def make_objective() -> Classification:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        image_size=IMAGE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.1
    )
    return Classification(backbone, num_classes=CLASSES, label_smoothing=0.1, seed=5)


def make_optimizer(module: torch.nn.Module, lr: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(module, weight_decay=WEIGHT_DECAY), lr=lr, betas=(0.9, 0.95))


def global_batch(step: int, size: int) -> dict[str, torch.Tensor]:
    """The same on every rank: images already normalised, float32."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "images": torch.randn(size, 3, IMAGE, IMAGE, generator=generator),
        "labels": torch.randint(0, CLASSES, (size,), generator=generator),
        "weights": torch.ones(size),
        "positions": torch.arange(step * size, (step + 1) * size),
    }


def micro_batches_of(batch: dict[str, torch.Tensor], rank: int, world_size: int, micro: int) -> list[dict]:
    """This rank's slice, padded to whole micro-batches with samples of weight 0."""
    rows = torch.as_tensor(slice_batch(batch["positions"].numpy(), rank=rank, world_size=world_size))
    first = int(batch["positions"][0])
    rows = torch.where(rows >= 0, rows - first, -1)
    rows = torch.nn.functional.pad(rows, (0, -len(rows) % micro), value=-1)
    real = rows >= 0
    taken = {name: tensor[rows.clamp(min=0)].clone() for name, tensor in batch.items()}
    taken["weights"] *= real
    taken["positions"] = torch.where(real, taken["positions"], -1)
    taken["labels"] = torch.where(real, taken["labels"], -1)
    return [{k: v[i : i + micro] for k, v in taken.items()} for i in range(0, len(rows), micro)]


def build_engine(world, *, stage: int, precision: str, batch_size: int, micro: int) -> ZeroEngine:
    slice_size = len(slice_batch(torch.arange(batch_size).numpy(), rank=0, world_size=world.world_size))
    config = deepspeed_config(
        {"zero_optimization": {"stage": stage}},
        precision=precision,
        micro_batch_size=micro,
        accumulation_steps=-(-slice_size // micro),
        world_size=world.world_size,
        clip_grad_norm=CLIP,
        num_parameters=sum(parameter.numel() for parameter in make_objective().parameters()),
    )
    return ZeroEngine(make_objective(), build_optimizer=make_optimizer, config=config, world=world)


def train(
    engine: ZeroEngine, world, steps: range, *, batch_size: int, micro: int
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of `steps`."""
    objective = engine.module
    losses, norms = [], []
    for step in steps:
        micro_batches = micro_batches_of(global_batch(step, batch_size), world.rank, world.world_size, micro)
        count = sum_over_ranks(torch.tensor(sum(objective.count(b) for b in micro_batches)))
        sums = Sums(engine.device)
        for batch in micro_batches:
            loss_sum, _ = engine.forward(batch["images"], batch)
            engine.backward(loss_sum / count)
            sums.add(loss=loss_sum)
        norms.append(float(engine.step(LRS[step])))
        losses.append(sums.over_ranks()["loss"] / float(count))
    return losses, norms


def run_case(world, **case) -> dict:
    engine = build_engine(world, **case)
    losses, norms = train(engine, world, range(STEPS), batch_size=case["batch_size"], micro=case["micro"])
    return {
        "losses": losses,
        "norms": norms,
        "optimizer_steps": engine.optimizer_steps,
        "weights": {name: values.tolist() for name, values in gather(engine, "weight").items()},
    }


def run_transfer(world, folder: Path, *, before: int, after: int, precision: str) -> dict:
    """Three steps at stage `before`, saved, loaded at stage `after`: is it the same state, does it go on?"""
    case = {"precision": precision, "batch_size": 16, "micro": 8}
    engine = build_engine(world, stage=before, **case)
    train(engine, world, range(3), batch_size=16, micro=8)
    saved = save_checkpoint(
        folder,
        engine.owned_fragments(),
        world=world,
        keep_last=1,
        facts={
            "step": 3,
            "samples": 48,
            "optimizer_steps": engine.optimizer_steps,
            "attempt": 1,
            "world_size": world.world_size,
            "zero_stage": before,
            "config": {},
            "dataset": {},
            "order": {},
            "parameters": parameter_shapes(engine.module),
        },
    )
    other = build_engine(world, stage=after, **case)
    reader = CheckpointReader(saved.path)
    load_fragments(reader, other.fragments())
    other.optimizer_steps = reader.manifest.optimizer_steps
    other.publish_weights()
    equal = True
    for kind in KINDS:
        mine, theirs = gather(engine, kind), gather(other, kind)
        equal &= all(torch.equal(mine[name], theirs[name]) for name in mine)
    went_on, _ = train(engine, world, range(3, 6), batch_size=16, micro=8)
    resumed, _ = train(other, world, range(3, 6), batch_size=16, micro=8)
    return {"equal": equal, "steps": other.optimizer_steps, "went_on": went_on, "resumed": resumed}


def gather(engine: ZeroEngine, kind: str) -> dict[str, torch.Tensor]:
    """Whole float32 masters or moments from all ranks; each element must come from exactly one rank."""
    sizes = {name: torch.Size(shape).numel() for name, shape in parameter_shapes(engine.module).items()}
    flat, owners = torch.zeros(sum(sizes.values())), torch.zeros(sum(sizes.values()))
    value_of, owners_of = (
        dict(zip(sizes, all.split(list(sizes.values())), strict=True)) for all in (flat, owners)
    )
    for fragment in engine.owned_fragments():
        value_of[fragment.name].narrow(0, fragment.start, fragment.count).copy_(fragment.tensors[kind])
        owners_of[fragment.name].narrow(0, fragment.start, fragment.count).add_(1)
    sum_over_ranks(flat), sum_over_ranks(owners)  # in place: one collective each, for all parameters
    for name, owned in owners_of.items():
        assert bool((owned == 1).all()), f"{name}: not owned exactly once"
    return value_of


def main() -> None:
    out, work = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = join(timeout_seconds=60)
    results = {name: run_case(world, **case) for name, case in work["cases"].items()}
    for name, case in work["transfers"].items():
        results[name] = run_transfer(world, out.parent / name.replace(" ", "-"), **case)
    if world.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
