"""What an engine holds of the training state, as live views. Called by both engines and checkpoint/.

Whatever the ZeRO stage, a rank's share of a parameter is a contiguous range of it, flattened, in
float32: its weight (the master), the optimizer's moments for the same range, and the average of the
weight where the run keeps one. Saving reads the views; loading writes them and then asks the engine
to publish the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.optim.ema import WeightAverage

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # LAMB's too
MUON_MOMENTS = ("momentum_buffer",)


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [start, start + count) of the flattened parameter `name`.

    `tensors` maps `weight`, each moment and, where there is an average, `ema` to a 1-D float32 view
    of `count` elements that aliases the engine's own storage.
    """

    name: str
    start: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        return self.tensors["weight"].numel()

    def narrow(self, start: int, count: int) -> Fragment:
        """The part of it that begins `start` elements in and holds `count`."""
        parts = {kind: tensor.narrow(0, start, count) for kind, tensor in self.tensors.items()}
        return Fragment(name=self.name, start=self.start + start, tensors=parts)


def share(fragments: list[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """This rank's part of state that every rank holds whole, so that together they save it once."""
    parts = []
    for fragment in fragments:
        begin = fragment.count * rank // world_size
        end = fragment.count * (rank + 1) // world_size
        if end > begin:
            parts.append(fragment.narrow(begin, end - begin))
    return parts


def moments_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """What an optimizer keeps of each element of a parameter group."""
    return MUON_MOMENTS if group.get("use_muon") else ADAM_MOMENTS


def prepare_state(optimizer: torch.optim.Optimizer, masters: list[torch.Tensor]) -> None:
    """Give every master zero moments and step 0, as the optimizer itself would at its first step.

    DeepSpeed makes this state late at some stages and, at others, by a trial step that leaves the
    step counter at 1; loading needs it there and right from the start.
    """
    by_muon = {id(p) for group in optimizer.param_groups if group.get("use_muon") for p in group["params"]}
    # the fused kernel wants its counter on the device
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for master in masters:
        state = optimizer.state[master]
        state.clear()
        if id(master) not in by_muon:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
        for moment in moments_of({"use_muon": id(master) in by_muon}):
            state[moment] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()


def views(
    optimizer: torch.optim.Optimizer,
    master: torch.Tensor,
    start: int,
    count: int,
    average: WeightAverage | None,
) -> dict[str, torch.Tensor]:
    """A fragment's tensors: `count` elements of a master from `start` on, and of what belongs to it."""
    held = {"weight": master.detach()}
    held |= {name: value for name, value in optimizer.state[master].items() if name != "step"}
    if average is not None:
        held["ema"] = average.of(master)
    return {kind: tensor.view(-1).narrow(0, start, count) for kind, tensor in held.items()}


def get_optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """How many steps the optimizer took (Adam's bias correction counts them)."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, f"parameters disagree on the number of optimizer steps: {sorted(counts)}"
    return counts.pop() if counts else 0


def set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))
