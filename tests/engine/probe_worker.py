"""One rank of test_probes_over_ranks: probes and draws a small network at each ZeRO stage, between its training steps
and before.

Started by torch's launcher variables; writes what rank 0 saw to the file named on the command line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from zero_worker import make_objective, make_optimizer, train

from pretrain.analysis.choice import WHAT
from pretrain.analysis.figures import analyze
from pretrain.data.augment import DeviceTransform, EvalTransform
from pretrain.data.index import open_index
from pretrain.data.loader import EvalLoader
from pretrain.data.reader import ChunkReader
from pretrain.distributed import World, from_main_in_pieces, gather_rows, join, leave
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.errors import DataError, exit_code_kept
from pretrain.evaluations import ProbePlan, probe
from pretrain.probes.features import extract_features
from pretrain.probes.suite import ProbeChoice
from pretrain.pulse import Pulse

CLASSES, STEPS, BATCH = 6, 3, 12
TRANSFORM = DeviceTransform(mean=(0.5,) * 3, std=(0.5,) * 3)


def loader(url: str, world: World) -> EvalLoader:
    return EvalLoader(
        reader=ChunkReader(open_index(url)),
        transform=EvalTransform(image_size=16),
        batch_size=5,
        rank=world.rank,
        world_size=world.world_size,
    )


def make_plan(urls: dict[str, str], world: World) -> ProbePlan:
    return ProbePlan(
        choice=ProbeChoice(knn=True, linear=True, few_shot=(3,), dense=True),
        train=loader(urls["train"], world),
        val=loader(urls["val"], world),
        num_classes=CLASSES,
        facts={},
        every_steps=None,
        at_start=False,
    )


def features_on_main(engine, urls: dict[str, str], world: World) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = extract_features(
        engine.module.backbone, loader(urls["train"], world), TRANSFORM, world.device, reading=engine.reading
    )
    # Pieces of one row or so: the ranks' parts must still come out in order.
    return tuple(gather_rows(rows, world=world, piece_bytes=600) for rows in (features, labels))


def figures_of(engine, urls: dict[str, str], world: World, each_batch) -> dict:
    found = analyze(
        engine.module.backbone,
        WHAT,
        batches=loader(urls["val"], world),
        device_transform=TRANSFORM,
        device=world.device,
        reading=engine.reading,
        each_batch=each_batch,
    )
    return {
        "images": found.images,
        "heads": [[head.mean, head.deviation, head.prefix_share, head.uniform] for head in found.heads],
        "similarity": found.similarity.flatten().tolist(),
        "filters": found.filters.filters.flatten().tolist(),
    }


def build_engine(world: World, stage: int) -> ZeroEngine:
    settings = deepspeed_config(
        # Nothing stays gathered at stage 3: a small network would, by default.
        {
            "zero_optimization": {
                "stage": stage,
                **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
            }
        },
        precision="float32",
        micro_batch_size=2,
        accumulation_steps=2,
        world_size=world.world_size,
        clip_grad_norm=1.0,
        num_parameters=sum(parameter.numel() for parameter in make_objective().parameters()),
    )
    return ZeroEngine(make_objective(), build_optimizer=make_optimizer, config=settings, world=world)


def run_stage(world: World, stage: int, urls: dict[str, str]) -> dict:
    plain = build_engine(world, stage)
    undisturbed, _ = train(plain, world, range(STEPS), batch_size=BATCH, micro=2)
    after_plain = features_on_main(plain, urls, world)[0]

    engine, plan, pulse = build_engine(world, stage), make_plan(urls, world), Pulse()

    def beat() -> None:
        pulse.at("validate")

    features, labels = features_on_main(engine, urls, world)
    results, disturbed = [], []
    figures = figures_of(engine, urls, world, beat)
    for step in range(STEPS):
        if step == 1:  # once is enough of the one that takes long
            plan = replace(plan, choice=replace(plan.choice, linear=False))
        found = probe(engine, plan, device_transform=TRANSFORM, world=world, each_batch=beat, moved=beat)
        results.append({"samples": [found.train_samples, found.val_samples], "top1": found.top1})
        figures_of(engine, urls, world, beat)
        disturbed += train(engine, world, range(step, step + 1), batch_size=BATCH, micro=2)[0]
    after = features_on_main(engine, urls, world)[0]
    partitioned = sum(parameter.numel() == 0 for parameter in engine.module.parameters())
    return {
        "undisturbed": undisturbed,
        "disturbed": disturbed,
        "probes": results,
        "figures": figures,
        "features": features.tolist(),
        "labels": labels.tolist(),
        "same features after": bool(torch.equal(after, after_plain)),
        "moved": float((after - features).abs().max()) if world.is_main else 0.0,
        "training mode": engine.module.training and engine.module.backbone.training,
        "partitioned": partitioned,
    }


def run_waiting(world: World) -> dict:
    """Rank 0 works for a while, in pieces, and fails once: what the others notice."""
    moves = 0

    def moved() -> None:
        nonlocal moves
        moves += 1

    def work(alive):
        for _ in range(30):
            time.sleep(0.05)
            alive()
        return {"answer": 42}

    result = from_main_in_pieces(world, work, moved=moved, every_seconds=0.2)

    def fail(alive):
        alive()
        raise DataError("nothing to see")

    try:
        from_main_in_pieces(world, fail, moved=moved)
        error = ""
    except DataError as caught:
        error = str(caught)
    return {"moves": moves, "result": result, "error": error}


def main() -> None:
    out, urls, stages = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    world = join(timeout_seconds=60)
    results = {f"stage {stage}": run_stage(world, stage, urls) for stage in stages}
    waiting = run_waiting(world)
    out.with_name(f"waiting-{world.rank}.json").write_text(json.dumps(waiting))
    if world.is_main:
        out.write_text(json.dumps(results))
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
