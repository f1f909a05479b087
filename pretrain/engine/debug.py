"""One device, no launcher: the step through accelerate. Chosen by train.py when it runs alone.

Weights, moments and their average are float32; in bf16 the forward runs under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from pretrain.engine.cpu_bf16 import bf16_products
from pretrain.engine.fragments import (
    Fragment,
    get_optimizer_steps,
    prepare_state,
    set_optimizer_steps,
    views,
)
from pretrain.engine.teacher import average_copy, check_teacher
from pretrain.objectives.contract import Objective
from pretrain.optim.ema import WeightAverage
from pretrain.optim.parameter_groups import set_learning_rates


class AccelerateEngine:
    """See engine/base.py for the contract."""

    zero_stage = 0

    def __init__(
        self,
        objective: Objective,
        *,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        precision: str,
        clip_grad_norm: float | None,
        device: torch.device,
        build_average: Callable[[list[torch.Tensor]], WeightAverage] | None = None,
    ) -> None:
        check_teacher(objective, zero_stage=self.zero_stage, averages=build_average is not None)
        self._is_bf16 = precision == "bf16"
        self._accelerator = Accelerator(
            mixed_precision="bf16" if self._is_bf16 else "no", cpu=device.type == "cpu"
        )
        assert self._accelerator.num_processes == 1, "accelerate's engine is for one process"
        self.device = self._accelerator.device
        self.module: Any = objective.to(self.device)
        self._optimizer = build_optimizer(self.module)
        self._prepared, self._stepper = self._accelerator.prepare(self.module, self._optimizer)
        self._parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self._clip_grad_norm = clip_grad_norm
        self.skipped = False
        masters: list[torch.Tensor] = list(self._parameters.values())
        prepare_state(self._optimizer, masters)
        self._average = build_average(masters) if build_average else None
        self.averages = self._average is not None
        self._teacher = average_copy(objective, self.fragments(), world=None)
        self.publish_weights()
        self._updates = 0  # as the optimizer counts them, on the host

    def forward(self, images: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with bf16_products(self.device, enabled=self._is_bf16):
            return self._prepared(images, batch)

    @contextmanager
    def reading(self) -> Iterator[None]:
        with bf16_products(self.device, enabled=self._is_bf16), self._accelerator.autocast():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        with bf16_products(self.device, enabled=self._is_bf16):
            self._accelerator.backward(loss)

    def step(self, lr: float, *, freeze_backbone: bool = False) -> torch.Tensor:
        set_learning_rates(self._stepper.param_groups, lr, freeze_backbone=freeze_backbone)
        limit = float("inf") if self._clip_grad_norm is None else self._clip_grad_norm
        norm = self._accelerator.clip_grad_norm_(self._parameters.values(), limit)
        assert norm is not None, "gradients are complete at every step"
        self.skipped = not bool(torch.isfinite(norm))
        if not self.skipped:
            self._stepper.step()
            self._updates += 1
            if self._average is not None:
                self._average.update(self._updates)
            if self._teacher is not None:
                self._teacher.refresh()
        self._stepper.zero_grad()
        return norm.detach().float()

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(
                name=name,
                start=0,
                tensors=views(self._optimizer, parameter, 0, parameter.numel(), self._average),
            )
            for name, parameter in self._parameters.items()
        ]

    def owned_fragments(self) -> list[Fragment]:
        return self.fragments()

    def replicated_weights(self) -> dict[str, torch.Tensor]:
        return {}  # there is nobody to compare with

    def publish_weights(self) -> None:
        if self._teacher is not None:  # the fragments are the weights themselves
            self._teacher.refresh()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        assert self._average is not None, "the run keeps an average"
        self._average.swap()
        try:
            yield
        finally:
            self._average.swap()

    @property
    def optimizer_steps(self) -> int:
        return get_optimizer_steps(self._optimizer)

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        set_optimizer_steps(self._optimizer, steps)
        self._updates = steps
