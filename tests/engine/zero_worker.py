"""One rank of test_zero_equals_plain_pytorch: trains a small ViT for ten steps, in each case asked for.

Started by torch's launcher variables; writes what rank 0 saw to the file named on the command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pretrain.data.order import slice_batch
from pretrain.distributed import Sums, join, sum_over_ranks
from pretrain.engine.fragments import Fragment
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.models.build import build_vit
from pretrain.objectives.classification import Classification
from pretrain.optim.parameter_groups import parameter_groups

IMAGE, PATCH, CLASSES, STEPS = 16, 4, 7, 10
LRS = [1e-3 * (step + 1) / STEPS for step in range(STEPS)]
WEIGHT_DECAY, CLIP = 0.1, 1.0


def make_objective() -> Classification:
    torch.manual_seed(0)
    backbone = build_vit(
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


def run_case(world, *, stage: int, precision: str, batch_size: int, micro: int) -> dict:
    slice_size = len(slice_batch(torch.arange(batch_size).numpy(), rank=0, world_size=world.world_size))
    config = deepspeed_config(
        {"zero_optimization": {"stage": stage}},
        precision=precision,
        micro_batch_size=micro,
        accumulation_steps=-(-slice_size // micro),
        world_size=world.world_size,
        clip_grad_norm=CLIP,
    )
    objective = make_objective()
    engine = ZeroEngine(objective, build_optimizer=make_optimizer, config=config, world=world)
    losses, norms = [], []
    for step in range(STEPS):
        micro_batches = micro_batches_of(global_batch(step, batch_size), world.rank, world.world_size, micro)
        count = sum_over_ranks(torch.tensor(sum(objective.count(b) for b in micro_batches)))
        sums = Sums(engine.device)
        for batch in micro_batches:
            loss_sum, _ = engine.forward(batch["images"].to(engine.input_dtype), batch)
            engine.backward(loss_sum / count)
            sums.add(loss=loss_sum)
        norms.append(float(engine.step(LRS[step])))
        losses.append(sums.over_ranks()["loss"] / float(count))
    return {
        "losses": losses,
        "norms": norms,
        "optimizer_steps": engine.optimizer_steps,
        "weights": gather_weights(engine.owned_fragments(), objective, world),
    }


def gather_weights(owned: list[Fragment], objective, world) -> dict[str, list[float]]:
    """Whole float32 masters from all ranks' fragments; each element must come from exactly one rank."""
    whole = {}
    for name, parameter in objective.named_parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        values, owners = torch.zeros(size), torch.zeros(size)
        for fragment in owned:
            if fragment.name == name:
                values[fragment.start : fragment.start + fragment.count] = fragment.tensors["weight"].cpu()
                owners[fragment.start : fragment.start + fragment.count] += 1
        assert bool((sum_over_ranks(owners) == 1).all()), f"{name}: not owned exactly once"
        whole[name] = sum_over_ranks(values).tolist()
    return whole


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = join(timeout_seconds=60)
    results = {name: run_case(world, **case) for name, case in cases.items()}
    if world.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
