"""One rank of test_nonfinite_steps: four steps, of which one goes wrong on one rank, in each case asked for; and
comparisons of replicas of which one bit was flipped.

Started by torch's launcher variables; writes what rank 0 saw to the file named on the command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import zero_worker as worker

from pretrain.checkpoint.manifest import EMA, KINDS
from pretrain.distributed import Sums, gather_objects, join, leave
from pretrain.errors import exit_code_kept
from pretrain.metrics.compute_time import ComputeTime
from pretrain.pulse import Pulse
from pretrain.replicas import Replicas
from pretrain.steps import take_step

STEPS, BAD_STEP = 4, 1


class InfiniteGradient(torch.autograd.Function):
    """Its input, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


# What a micro-batch's loss becomes on the rank, and in the step, that goes wrong.
WRONGS = {
    "NaN loss": lambda loss: loss * float("nan"),
    "infinite gradient of a finite loss": InfiniteGradient.apply,
    "NaN loss with a finite gradient": lambda loss: loss + float("nan"),
    "one of its micro-batches": lambda loss: loss * float("nan"),
}


def run(world: Any, engine: Any, case: dict[str, Any], wrong: str | None) -> dict[str, Any]:
    """Four steps; without `wrong` the bad one is not taken at all."""
    right = engine.forward
    told: list[dict[str, Any]] = []
    for step in range(STEPS):
        if wrong is None and step == BAD_STEP:
            continue
        batch = worker.global_batch(step, case["batch_size"])
        micro_batches = worker.micro_batches_of(batch, world.rank, world.world_size, case["micro"])
        struck = [0]

        def forward(images: torch.Tensor, batch: Any, step: int = step, struck: list[int] = struck) -> Any:
            loss, metrics = right(images, batch)
            struck[0] += 1
            is_hit = step == BAD_STEP and world.rank == 1 and wrong is not None
            if is_hit and (wrong != "one of its micro-batches" or struck[0] == 1):
                loss = WRONGS[wrong](loss)
            return loss, metrics

        engine.forward = forward
        sums = Sums(engine.device)
        norm = take_step(
            engine,
            micro_batches,
            lambda b: (b["images"], dict(b)),
            lr=worker.LRS[step],
            sums=sums,
            pulse=Pulse(),
            compute=ComputeTime(engine.device),
        )
        told.append({"step": step, "finite": bool(torch.isfinite(norm)), "skipped": engine.skipped})
    engine.forward = right
    return {
        "told": gather_objects(told),
        "optimizer_steps": engine.optimizer_steps,
        "state": {kind: worker.gather(engine, kind) for kind in (*KINDS, EMA)},
        "weights": {name: p.detach().clone() for name, p in engine.replicated_weights().items()},
    }


def compared(world: Any, case: dict[str, Any]) -> dict[str, str | None]:
    """What a comparison of replicas says: of sound ones, of a bit flipped in rank 1's copy, and in rank 0's master."""
    engine = worker.build_engine(world, **case)
    replicas = Replicas(engine, world=world, every_steps=1)
    replicas.begin(0)
    said: dict[str, str | None] = {}

    def compare(name: str) -> None:
        fault = replicas.compare(1)
        said[name] = None if fault is None else fault.reason
        replicas.begin(0)

    compare("sound")
    copy = engine.replicated_weights()["backbone.blocks.1.mlp.fc2.weight"]
    bits = copy.view(torch.int16 if copy.element_size() == 2 else torch.int32)
    if world.rank == 1:
        bits[7] ^= 4
    compare("copy of rank 1")
    if world.rank == 1:
        bits[7] ^= 4
    compare("mended")
    if world.rank == 0:
        fragment = engine.owned_fragments()[0]
        fragment.tensors["weight"].view(torch.int32)[3] ^= 1 << 26
    compare("master of rank 0")
    return said


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = join(timeout_seconds=60)
    results = {}
    references: dict[str, dict[str, Any]] = {}
    for name, (case, wrong) in cases.items():
        if str(case) not in references:
            references[str(case)] = run(world, worker.build_engine(world, **case, ema=True), case, None)
        without = references[str(case)]
        got = run(world, worker.build_engine(world, **case, ema=True), case, wrong)
        differing = [
            f"{kind} of {parameter}"
            for kind in (*KINDS, EMA)
            for parameter, values in without["state"][kind].items()
            if not torch.equal(values, got["state"][kind][parameter])
        ]
        differing += [
            f"copy of {parameter}"
            for parameter, values in without["weights"].items()
            if not torch.equal(values, got["weights"][parameter])
        ]
        results[name] = {
            "told": got["told"],
            "differing": gather_objects(differing),
            "optimizer_steps": got["optimizer_steps"],
        }
    for name, case in json.loads(sys.argv[3]).items():
        results[name] = compared(world, case)
    if world.is_main:
        out.write_text(json.dumps(results))
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
