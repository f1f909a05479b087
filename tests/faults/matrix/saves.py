"""Save checkpoints as a rank would, for tests that kill it. A program: `saves.py RUN` reads lines from stdin.

Each line is {"step": n, "bytes": m or null}: a process of its own saves state of nothing but n, and the kernel ends
it when it has written m bytes of one file. The answer is {"code": its return code}, negative for a signal.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from pretrain.checkpoint.save import save_checkpoint
from pretrain.distributed import World
from pretrain.engine.fragments import ADAM_MOMENTS, Fragment

SHAPES = {"blocks.0.weight": (64, 64), "blocks.0.bias": (64,), "head.weight": (10, 64)}


def save(run_dir: Path, step: int) -> None:
    fragments = []
    for name, shape in SHAPES.items():
        values = torch.full((torch.Size(shape).numel(),), float(step))
        fragments.append(
            Fragment(name=name, start=0, tensors={"weight": values, **dict.fromkeys(ADAM_MOMENTS, values)})
        )
    facts = {
        "step": step,
        "samples": step,
        "optimizer_steps": step,
        "attempt": 1,
        "world_size": 1,
        "zero_stage": 0,
        "config": {},
        "dataset": {},
        "order": {"lanes": 2},
        "parameters": {name: list(shape) for name, shape in SHAPES.items()},
    }
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)
    save_checkpoint(run_dir, fragments, world=world, keep_last=2, facts=facts)


def main() -> None:
    run_dir = Path(sys.argv[1])
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            if wanted["bytes"] is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["bytes"], wanted["bytes"]))
            save(run_dir, wanted["step"])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
