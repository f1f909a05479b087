"""What an objective is to engines, train.py and the other commands. __init__.py says how one more is added."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pretrain.models.backbone import Backbone


class Objective(Protocol):
    """An nn.Module that has these. Its loss is a **sum**, so that it does not matter how a global batch is cut into
    ranks and micro-batches.

    Two more things make it so. What is random follows from (seed, batch["positions"]), by keyed_random.py. And a
    sample's loss depends on that sample, not on its neighbours in the micro-batch; an objective for which that cannot
    be is listed in README.md under "Resuming", among the exempt.

    Between steps it keeps nothing but its parameters: they are what checkpoints hold. (Its buffers follow from its
    arguments.)
    """

    @property
    def backbone(self) -> Backbone:
        """What is learned for later use: exports, probes and analysis take it alone."""
        ...

    @property
    def teacher(self) -> Teacher | None:
        """None, or copies of some of its modules that the engine keeps at the average of the weights."""
        ...

    def count(self, batch: Mapping[str, Any]) -> float:
        """What the loss sum of `batch`, on the host, will be divided by: images, masked patches, pairs of views. Looks
        at no device, and at `weights` (B,) alone if it can; a sample of weight 0 is a pad, and counts nothing."""
        ...

    def __call__(self, images_BCHW: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward`: the loss sum (float32 scalar) and metric sums, both over weighted samples, of one micro-batch.

        images: normalised float32 (B, 3, S, S), augmented once; further views are cut from them here. batch, on their
        device: weights float32 (B,), positions and labels int64 (B,), and what data/mixup.py adds. No host sync.
        """
        ...

    # Of nn.Module, what engines and commands ask for.

    def to(self, device: torch.device) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any: ...


class Teacher(nn.ModuleDict):
    """Frozen copies of an objective's modules, by the names that these have in it: `Teacher({"backbone": backbone})`.

    The engine writes the average of the weights (optim.ema_decay) into it, rounded to the precision that the network
    is computed in: at the start, after a checkpoint was loaded, and after each step that was not left out. So it
    follows from what checkpoints hold, and is in none; nor is it trained, averaged or exported. Call it under
    torch.no_grad(); it stays in evaluation mode, without stochastic depth.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__({name: copy.deepcopy(module) for name, module in modules.items()})
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)


def as_module(objective: Objective) -> nn.Module:
    """The same, for what takes any nn.Module: a Protocol cannot say that it is one."""
    assert isinstance(objective, nn.Module), f"an objective is an nn.Module, got {type(objective).__name__}"
    return objective
