"""State to save without training, and what a rank does that only saves. Used by the tests of saving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.checkpoint.load import CheckpointReader
from pretrain.checkpoint.manifest import KINDS
from pretrain.checkpoint.saver import Saver
from pretrain.distributed import World
from pretrain.engine.fragments import Fragment, share
from pretrain.metrics.reporter import Reporter

PATIENCE_SECONDS = 60
SHAPES = {"small": [3], "large": [2_000_000]}  # 24 MB of weights and moments
ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)


class HeldState:
    """An engine's state without its steps: parameters of `shapes`, cut over ranks as the sharded engines do."""

    zero_stage = 1
    optimizer_steps = 0
    device = torch.device("cpu")

    def __init__(self, shapes: dict[str, list[int]], *, rank: int = 0, world_size: int = 1) -> None:
        self.module = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
        )
        self._whole = [
            Fragment(name=name, start=0, tensors={kind: torch.zeros(math.prod(shape)) for kind in KINDS})
            for name, shape in shapes.items()
        ]
        self._rank, self._world_size = rank, world_size

    def fill(self, step: int) -> HeldState:
        """The state of that step."""
        generator = torch.Generator().manual_seed(step)
        for fragment in self._whole:
            for tensor in fragment.tensors.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        self.optimizer_steps = step
        return self

    def owned_fragments(self) -> list[Fragment]:
        return share(self._whole, self._rank, self._world_size)

    def is_in(self, folder: Path) -> bool:
        """Bitwise, and every byte of the checkpoint verified."""
        reader = CheckpointReader(folder)
        equal = True
        for fragment in self._whole:
            for kind in KINDS:
                for offset, values in reader.pieces(fragment.name, kind, 0, fragment.count):
                    equal &= torch.equal(fragment.tensors[kind].narrow(0, offset, len(values)), values)
        return equal


def facts(step: int, attempt: int = 1) -> dict[str, Any]:
    return {
        "step": step,
        "samples": 8 * step,
        "attempt": attempt,
        "config": {"seed": 0},
        "dataset": {"url": "u", "identity": "i"},
        "order": {"lanes": 8},
    }


def make_saver(run_dir: Path, state: Any, *, world: World = ALONE, **settings: Any) -> Saver:
    """In attempt 1 of `run_dir`, where nothing was claimed."""
    reporter = Reporter(journal=None, progress=None, server=None, log_every_steps=1, total_steps=1)
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        reporter = Reporter.for_main(run_dir, attempt=1, total_steps=1, server=None, log_every_steps=1)
    given = {"attempt": 1, "keep_last": 100, **settings}
    return Saver(run_dir, state, world=world, reporter=reporter, **given)


def children(parent: int) -> dict[int, str]:
    """Process ids and command lines of those that live."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if command:  # else it has ended
            found[int(pid)] = command.replace(b"\0", b" ").decode()
    return found


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen in time"
        time.sleep(0.001)


def writer_of(process: int) -> int:
    """The writer that a process has, once it has one."""
    found: list[int] = []

    def look() -> list[int]:
        try:
            found[:] = [pid for pid, command in children(process).items() if "checkpoint.writer" in command]
        except OSError:  # the process is just coming up
            return []
        return found

    until(look)
    return found[0]


def written(run_dir: Path, step: int) -> int:
    """Bytes so far of rank 0's file of a save that is under way."""
    sizes = [
        path.stat().st_size for path in run_dir.glob(f"checkpoints/step-{step:08d}.*/rank-00000.safetensors")
    ]
    return max(sizes, default=0)


def listing(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def poll_until_failed(saver: Saver) -> None:
    def failed() -> float:
        saver.poll()
        return saver.failed()

    until(failed)
