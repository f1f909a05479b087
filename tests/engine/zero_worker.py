"""One rank of test_zero_equals_plain_pytorch: trains a small ViT for ten steps, in each case asked for.

Started by torch's launcher variables; writes what rank 0 saw to the file named on the command line.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = (
    "1"  # compiling DeepSpeed's Muon takes longer than all that is trained here
)

import torch

from pretrain.checkpoint.load import CheckpointReader, load_fragments
from pretrain.checkpoint.save import save_checkpoint
from pretrain.data.order import slice_batch
from pretrain.distributed import Sums, gather_objects, join, leave, sum_over_ranks
from pretrain.engine.base import parameter_shapes
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.errors import AskedToStopError, exit_code_kept
from pretrain.models.layer_ids import layer_of
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.optim.ema import WeightAverage
from pretrain.optim.lamb import Lamb
from pretrain.optim.muon import Muon
from pretrain.optim.parameter_groups import (
    layer_scales,
    only_last_blocks,
    parameter_groups,
    without_gradients,
)

IMAGE, PATCH, CLASSES, STEPS = 16, 4, 7, 10
LRS = [1e-3 * (step + 1) / STEPS for step in range(STEPS)]
WEIGHT_DECAY, CLIP = 0.1, 1.0
# Rules that a case may ask for: the head's own, layer-wise decay, and a backbone that stays for two steps.
HEAD_DECAY, HEAD_LR_SCALE, LAYER_DECAY, FROZEN_STEPS, DEPTH = 0.5, 2.0, 0.7, 2, 2
EMA_DECAY = 0.9
BETAS, MUON_LR_SCALE, MOMENTUM = (0.9, 0.95), 5.0, 0.9


def make_objective() -> Classification:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        image_size=IMAGE, patch_size=PATCH, embed_dim=24, depth=DEPTH, num_heads=2, drop_path_rate=0.1
    )
    return Classification(backbone, num_classes=CLASSES, label_smoothing=0.1, seed=5)


def layer(name: str) -> int:
    return layer_of("vit", name, (DEPTH,))


def only_last_block(name: str) -> float:
    return only_last_blocks(layer, num_layers=DEPTH + 2, blocks=1)(name)


def make_optimizer(
    module: torch.nn.Module, *, optimizer: str = "adamw", rules: bool = False, last_block: bool = False
) -> torch.optim.Optimizer:
    asked: dict[str, Any] = {"layer_scale": only_last_block} if last_block else {}
    if optimizer == "muon":
        asked |= {"muon_lr_scale": MUON_LR_SCALE, "muon_weight_decay": WEIGHT_DECAY}
    if rules:
        scale = layer_scales(layer, num_layers=DEPTH + 2, decay=LAYER_DECAY)
        asked |= {"head_weight_decay": HEAD_DECAY, "head_lr_scale": HEAD_LR_SCALE}
        asked |= {"layer_scale": scale, "apart": True}
    groups = parameter_groups(module, weight_decay=WEIGHT_DECAY, **asked)
    if optimizer == "muon":
        return Muon(groups, lr=0.0, momentum=MOMENTUM, betas=BETAS)
    if optimizer == "lamb":
        return Lamb(groups, lr=0.0, betas=BETAS)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS)


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


def build_engine(
    world,
    *,
    stage: int,
    precision: str,
    batch_size: int,
    micro: int,
    optimizer: str = "adamw",
    rules: bool = False,
    last_block: bool = False,
    ema: bool = False,
    ema_warmup: bool = False,
) -> ZeroEngine:
    objective = make_objective()
    if last_block:
        without_gradients(objective, only_last_block)
    slice_size = len(slice_batch(torch.arange(batch_size).numpy(), rank=0, world_size=world.world_size))
    config = deepspeed_config(
        {"zero_optimization": {"stage": stage}},
        precision=precision,
        micro_batch_size=micro,
        accumulation_steps=-(-slice_size // micro),
        world_size=world.world_size,
        clip_grad_norm=CLIP,
        num_parameters=sum(parameter.numel() for parameter in objective.parameters()),
        optimizer=optimizer,
    )
    return ZeroEngine(
        objective,
        build_optimizer=partial(make_optimizer, optimizer=optimizer, rules=rules, last_block=last_block),
        config=config,
        world=world,
        build_average=partial(WeightAverage, decay=EMA_DECAY, warmup=ema_warmup) if ema else None,
    )


def train(
    engine: ZeroEngine, world, steps: range, *, batch_size: int, micro: int, rules: bool = False
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
        norms.append(float(engine.step(LRS[step], freeze_backbone=rules and step < FROZEN_STEPS)))
        losses.append(sums.over_ranks()["loss"] / float(count))
    return losses, norms


def run_case(world, **case) -> dict:
    engine = build_engine(world, **case)
    asked = {name: case[name] for name in ("batch_size", "micro", "rules") if name in case}
    losses, norms = train(engine, world, range(STEPS), **asked)
    return {
        **(averaged(engine, world, case) if case.get("ema") else {}),
        "losses": losses,
        "norms": norms,
        "optimizer_steps": engine.optimizer_steps,
        "weights": {name: values.tolist() for name, values in gather(engine, "weight").items()},
        **_beyond(engine, world, case, asked),
    }


def _beyond(engine: ZeroEngine, world, case: dict, asked: dict) -> dict:
    if case.get("last_block"):
        return {"kept": kept(engine)}
    return muon_step(engine, world, asked) if case.get("optimizer") == "muon" else {}


def kept(engine: ZeroEngine) -> list[str]:
    """The parameters whose masters, and whose weights that `forward` uses, are bit for bit those of the start, on all
    ranks."""
    start = {name: p.detach().view(-1) for name, p in make_objective().named_parameters()}
    used = engine.replicated_weights()
    masters = gather(engine, "weight")
    mine = {
        name
        for name, weight in start.items()
        if torch.equal(masters[name], weight)
        and (name not in used or torch.equal(used[name], weight.to(used[name].dtype)))
    }
    return sorted(set.intersection(*gather_objects(mine)))


def muon_step(engine: ZeroEngine, world, asked: dict) -> dict:
    """One more step, and how far it is, of its length, from a step on whole matrices at its worst."""

    def whole() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        weights, momenta = gather(engine, "weight"), gather(engine, "momentum_buffer")
        shapes = parameter_shapes(engine.module)
        return {name: (weights[name].view(shapes[name]), m.view(shapes[name])) for name, m in momenta.items()}

    before, lr = whole(), LRS[-1] * MUON_LR_SCALE
    train(engine, world, range(STEPS - 1, STEPS), **asked)
    apart = []
    for name, (weight, momentum) in whole().items():
        start, momentum_before = before[name]
        gradient = (momentum - MOMENTUM * momentum_before) / (1 - MOMENTUM)
        step = torchs_muon if engine.zero_stage == 0 else deepspeeds_muon
        expected = step(start, momentum_before, gradient, lr)
        apart.append(float((expected - weight).norm() / (weight - start).norm()))
    drawn = [torch.randn(40, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    one, other = torchs_muon(*drawn, lr), deepspeeds_muon(*drawn, lr)
    off = float((one - other).norm() / (one - drawn[0]).norm())
    return {"muon step is off by": max(apart), "deepspeed's muon is off torch's by": off}


def torchs_muon(
    weight: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, lr: float
) -> torch.Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient
    optimizer = torch.optim.Muon([parameter], lr=lr, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM)
    optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
    optimizer.step()
    return parameter.detach()


def deepspeeds_muon(
    weight: torch.Tensor, momentum: torch.Tensor, gradient: torch.Tensor, lr: float
) -> torch.Tensor:
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    update = muon_update(gradient.clone(), momentum.clone(), beta=MOMENTUM, ns_method="standard")
    return (1 - lr * WEIGHT_DECAY) * weight - lr * update


def averaged(engine: ZeroEngine, world, case: dict) -> dict:
    """The average, what the network computes with it, and whether it leaves the weights as they were."""

    def held() -> list[torch.Tensor]:
        state = [tensor.clone() for fragment in engine.fragments() for tensor in fragment.tensors.values()]
        return [*state, *(weight.clone() for weight in engine.replicated_weights().values())]

    @torch.no_grad()
    def loss() -> float:
        (batch,) = micro_batches_of(global_batch(99, 16), world.rank, world.world_size, 8)
        sums = Sums(engine.device)
        engine.module.eval()
        sums.add(loss=engine.forward(batch["images"], batch)[0])
        engine.module.train()
        return sums.over_ranks()["loss"]

    before, of_weights = held(), loss()
    with engine.averaged_weights():
        of_average = loss()
    put_back = all(torch.equal(a, b) for a, b in zip(before, held(), strict=True)) and loss() == of_weights
    with suppress(AskedToStopError), engine.averaged_weights():
        loss()
        raise AskedToStopError("on all ranks alike")
    return {
        "put back": put_back,
        "put back when given up": all(torch.equal(a, b) for a, b in zip(before, held(), strict=True))
        and loss() == of_weights,
        "loss": of_weights,
        "loss of average": of_average,
        "ema": {name: values.tolist() for name, values in gather(engine, "ema").items()},
    }


def run_transfer(
    world, folder: Path, *, before: int, after: int, precision: str, optimizer: str = "adamw"
) -> dict:
    """Three steps at stage `before`, saved, loaded at stage `after`: is it the same state, does it go on?"""
    case = {"precision": precision, "batch_size": 16, "micro": 8, "optimizer": optimizer, "ema": True}
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
    kinds = ["weight", "ema", "exp_avg", "exp_avg_sq", *(["momentum_buffer"] if optimizer == "muon" else [])]
    for kind in kinds:
        mine, theirs = gather(engine, kind), gather(other, kind)
        equal &= all(torch.equal(mine[name], theirs[name]) for name in mine)
        equal &= sum(len(values) for values in mine.values()) > 0
    went_on, _ = train(engine, world, range(3, 6), batch_size=16, micro=8)
    resumed, _ = train(other, world, range(3, 6), batch_size=16, micro=8)
    return {"equal": equal, "steps": other.optimizer_steps, "went_on": went_on, "resumed": resumed}


def gather(engine: ZeroEngine, kind: str) -> dict[str, torch.Tensor]:
    """Whole float32 masters or moments from all ranks; each element must come from exactly one rank.

    Of a moment that an optimizer keeps of some parameters, those.
    """
    held = {fragment.name for fragment in engine.owned_fragments() if kind in fragment.tensors}
    held = set().union(*gather_objects(held))
    shapes = parameter_shapes(engine.module)
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items() if name in held}
    assert kind not in ("weight", "ema") or sizes.keys() == shapes.keys(), f"{kind}: not of all parameters"
    flat, owners = torch.zeros(sum(sizes.values())), torch.zeros(sum(sizes.values()))
    value_of, owners_of = (
        dict(zip(sizes, all.split(list(sizes.values())), strict=True)) for all in (flat, owners)
    )
    for fragment in engine.owned_fragments():
        if kind not in fragment.tensors:
            continue
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
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
