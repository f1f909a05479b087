"""One rank of test_state_bytes: what a ZeRO engine holds, in bytes, in each case asked for.

Started by torch's launcher variables; writes what rank 0 held to the file named on the command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from zero_worker import EMA_DECAY, global_batch, make_optimizer, micro_batches_of

from pretrain.distributed import World, join, leave
from pretrain.engine.zero import ZeroEngine, deepspeed_config
from pretrain.errors import exit_code_kept
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.optim.ema import WeightAverage

MICRO = 4


def make_objective() -> Classification:
    """Of so many parts that one which lies on two ranks, or is under way, does not count."""
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=4, embed_dim=64, depth=10, num_heads=2)
    return Classification(backbone, num_classes=7)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """{address: bytes} of what the tensors lie in: views of one storage count once."""
    held = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in held if storage.nbytes()}


def flattened(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from flattened(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from flattened(value)


# Where DeepSpeed keeps gradients: on parameters, or in its optimizer.
OF_PARAMETERS = ("grad", "grad_accum")
OF_OPTIMIZER = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer")
OF_OPTIMIZER += ("fp32_groups_gradients_flat",)


def gradients(engine: ZeroEngine) -> dict[int, int]:
    found: list[Any] = []
    for parameter in engine.module.parameters():
        found += [getattr(parameter, name, None) for name in OF_PARAMETERS]
    for name in OF_OPTIMIZER:
        found += list(flattened(getattr(engine._wrapped, name, None)))
    return storages(found)


def held(world: World, *, stage: int, precision: str, accumulation: int, optimizer: str) -> dict[str, float]:
    objective = make_objective()
    count = sum(parameter.numel() for parameter in objective.parameters())
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 8192}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # small ones would stay whole
    config = deepspeed_config(
        {"zero_optimization": zero},
        precision=precision,
        micro_batch_size=MICRO,
        accumulation_steps=accumulation,
        world_size=world.world_size,
        clip_grad_norm=1.0,
        num_parameters=count,
        optimizer=optimizer,
    )
    engine = ZeroEngine(
        objective,
        build_optimizer=partial(make_optimizer, optimizer=optimizer),
        config=config,
        world=world,
        build_average=partial(WeightAverage, decay=EMA_DECAY, warmup=False),
    )
    most: dict[str, int] = {"gradients": 0}

    def look(*_: Any) -> None:
        most["gradients"] = max(most["gradients"], sum(gradients(engine).values()))

    for parameter in list(engine.module.parameters())[::5]:
        parameter.register_post_accumulate_grad_hook(look)
    size = MICRO * accumulation * world.world_size
    for batch in micro_batches_of(global_batch(0, size), world.rank, world.world_size, MICRO):
        loss, _ = engine.forward(batch["images"], batch)
        engine.backward(loss / size)
        look()
    after = sum(gradients(engine).values())
    engine.step(1e-3)
    parameters = list(engine.module.parameters())
    weights = storages(getattr(p, "ds_tensor", p.data) for p in parameters)
    shards = engine._shards
    masters = storages([*shards.masters, *flattened([dict(s) for s in shards.optimizer.state.values()])])
    assert engine._average is not None, "asked for"
    return {
        "parameters": count,
        "weights": sum(weights.values()),
        "gradients": most["gradients"],
        "gradients after": after,
        "optimizer": sum(nbytes for address, nbytes in masters.items() if address not in weights),
        "ema": sum(storages(engine._average._averages).values()),
    }


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    world = join(timeout_seconds=60)
    results = {name: held(world, **case) for name, case in cases.items()}
    if world.is_main:
        out.write_text(json.dumps(results))
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
