"""How fast ranks add up a vector among all of them: `python -m launch.bandwidth SECONDS`, as each rank of a preflight.

Rank 0 prints what it found as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import torch.distributed as dist

from pretrain.distributed import join, leave
from pretrain.errors import exit_code_kept

VALUES = {"nccl": 64 << 20, "gloo": 4 << 20}  # bf16 of a ViT-B; on CPUs less, float32
_ROUNDS = 20


def main() -> None:
    seconds = float(sys.argv[1])
    world = join(timeout_seconds=seconds)
    backend = dist.get_backend()
    kind = torch.bfloat16 if backend == "nccl" else torch.float32
    values = torch.ones(VALUES[backend], dtype=kind, device=world.device)
    dist.all_reduce(values)  # connects
    assert float(values[0]) == world.world_size, f"{world.world_size} ranks added up to {float(values[0])}"
    rounds, taken, until = 0, 0.0, time.monotonic() + min(3.0, seconds / 4)
    go_on = torch.ones(1, device=world.device)
    while rounds < _ROUNDS and go_on.item():
        started = time.monotonic()
        dist.all_reduce(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        taken += time.monotonic() - started
        rounds += 1
        go_on.fill_(float(time.monotonic() < until))
        dist.broadcast(go_on, src=0)  # all ranks stop after the same round
    if world.is_main:
        size = values.numel() * values.element_size()
        # What each rank must send and receive in a ring, whatever the number of ranks.
        bus = 2 * (world.world_size - 1) / world.world_size * size * rounds / taken
        print(json.dumps({"backend": backend, "bytes": size, "rounds": rounds, "bus_bytes_per_second": bus}))
    leave()
    exit_code_kept(0)


if __name__ == "__main__":
    main()
