"""What train.py asks of an engine. `zero.py` and `debug.py` both answer it; train.py cannot tell them apart."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from pretrain.engine.fragments import Fragment
from pretrain.objectives.contract import Objective


class Engine(Protocol):
    """One optimizer step is: `forward` and `backward` for each micro-batch, then `step`.

    module: the objective, on `device`. Its parameters keep their names. Its teacher, where it has one, is the average
        of the weights from the start, after each step that was not skipped, and after `publish_weights`.
    zero_stage: 0 where state is not sharded.
    skipped: did the last `step` leave everything as it was, because the gradient was not finite?
    averages: is an average of the weights (EMA) kept?
    """

    module: Objective
    device: torch.device
    zero_stage: int
    skipped: bool
    averages: bool

    def forward(self, images: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The objective's loss sum (a float32 scalar) and its metric sums, for one micro-batch.

        `images`: float32 (B, 3, S, S), normalised; the objective casts them where it computes.
        """
        ...

    def reading(self) -> AbstractContextManager[Any]:
        """A context for one forward of a part of `module`, by itself and without gradients: it computes with the
        weights and in the precision of `forward`. All ranks together."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`. Over all ranks and micro-batches, the losses given here must
        add up to the loss to be descended: the engine neither averages nor rescales them."""
        ...

    def step(self, lr: float, *, freeze_backbone: bool = False) -> torch.Tensor:
        """Clip, update at learning rate `lr`, clear gradients. Returns the gradient's global
        2-norm before clipping, a float32 scalar on the device. Where that is not finite, on
        whichever rank it came from, all ranks only clear gradients, and `skipped` says so.
        freeze_backbone: the backbone's weights stay; its moments do not."""
        ...

    def fragments(self) -> list[Fragment]:
        """Everything this rank holds: live views, to be written by a load."""
        ...

    def owned_fragments(self) -> list[Fragment]:
        """This rank's part of the state; over all ranks they cover every parameter exactly once."""
        ...

    def replicated_weights(self) -> dict[str, torch.Tensor]:
        """The weights that `forward` uses, by name, where every rank holds all of them; else none."""
        ...

    def publish_weights(self) -> None:
        """Make the weights that `forward` uses those of the fragments. All ranks together."""
        ...

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it, `forward` uses the average of the weights, and no step is taken; after it, the weights
        again, bit for bit. All ranks together."""
        ...

    @property
    def optimizer_steps(self) -> int: ...

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None: ...


def parameter_shapes(module: Objective) -> dict[str, list[int]]:
    """The full shape of each trained parameter, whether or not the engine has partitioned it."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
