"""What DeepSpeed holds of the training state at each ZeRO stage, masters and moments. Called by zero.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from pretrain.distributed import World
from pretrain.engine.fragments import Fragment, views
from pretrain.optim.ema import WeightAverage
from pretrain.optim.lamb import Piece


class _ReplicatedShards:
    """Stage 0: every rank holds everything. In bf16, DeepSpeed keeps a float32 copy a parameter."""

    def __init__(self, wrapped: Any, trained: Mapping[str, nn.Parameter]) -> None:
        self._trained = trained
        self._masters_differ = isinstance(wrapped, FP16_UnfusedOptimizer)
        if self._masters_differ:
            self.optimizer = wrapped.optimizer
            pairs = zip(chain(*wrapped.fp16_groups), chain(*wrapped.fp32_groups), strict=True)
            master_of = {id(low): high for low, high in pairs}
            self._masters = {name: master_of[id(p)] for name, p in trained.items()}
        else:
            self.optimizer = wrapped
            self._masters = dict(trained)

    @property
    def masters(self) -> list[torch.Tensor]:
        return list(self._masters.values())

    def fragments(self, average: WeightAverage | None) -> list[Fragment]:
        return [
            Fragment(name=name, start=0, tensors=views(self.optimizer, master, 0, master.numel(), average))
            for name, master in self._masters.items()
        ]

    def publish(self) -> None:
        if self._masters_differ:
            for name, master in self._masters.items():
                self._trained[name].data.copy_(master.data)

    @contextmanager
    def without_update(self) -> Iterator[None]:
        """Within it, the optimizer's step finds no gradients, and updates nothing; clipping still has them."""

        def drop_gradients(*_: Any) -> None:
            for parameter in self._trained.values():
                parameter.grad = None

        hook = self.optimizer.register_step_pre_hook(drop_gradients)
        try:
            yield
        finally:
            hook.remove()

    def gradient_norm(self) -> torch.Tensor | None:
        if self._masters_differ:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])


class _FlatShards:
    """Stages 1 and 2: a rank owns one flat float32 partition a parameter group."""

    def __init__(self, wrapped: Any, trained: Mapping[str, nn.Parameter]) -> None:
        self._wrapped = wrapped
        self._trained = trained
        self.optimizer = wrapped.optimizer
        self.masters: list[torch.Tensor] = (
            wrapped.fp32_groups_flat_partition
            if isinstance(wrapped, BF16_Optimizer)
            else wrapped.single_partition_of_fp32_groups
        )

    def _mappings(self) -> Iterator[tuple[str, Any]]:
        parameter: Any  # DeepSpeed hangs its own attributes on parameters
        for name, parameter in self._trained.items():
            if parameter._hp_mapping is not None:  # else all of it lives on other ranks
                yield name, parameter._hp_mapping

    def fragments(self, average: WeightAverage | None) -> list[Fragment]:
        found = []
        for name, mapping in self._mappings():
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            master = self.masters[mapping.param_group_index]
            tensors = views(self.optimizer, master, here.start, here.numel, average)
            found.append(Fragment(name=name, start=there.start, tensors=tensors))
        return found

    def pieces(self) -> list[Piece]:
        """What of which parameter lies where in this rank's masters."""
        return [
            Piece(
                name=name,
                held=self.masters[mapping.param_group_index],
                offset=mapping.hp_fragment_address.start,
                count=mapping.hp_fragment_address.numel,
            )
            for name, mapping in self._mappings()
        ]

    def publish(self) -> None:
        self._wrapped.update_lp_params()

    def gradient_norm(self) -> torch.Tensor | None:
        return None


class _PartitionedShards:
    """Stage 3: each parameter is cut into equal parts, the last one padded."""

    def __init__(self, wrapped: Any, trained: Mapping[str, nn.Parameter], rank: int) -> None:
        self._wrapped = wrapped
        self._trained = trained
        self._rank = rank
        self.optimizer = wrapped.optimizer
        self.masters: list[torch.Tensor] = wrapped.fp32_partitioned_groups_flat

    def fragments(self, average: WeightAverage | None) -> list[Fragment]:
        found = []
        parameter: Any
        for name, parameter in self._trained.items():
            group, offset, part = self._wrapped.grad_position[self._wrapped.get_param_id(parameter)]
            begin = part * self._rank
            count = min(part, parameter.ds_numel - begin)
            if count > 0:
                tensors = views(self.optimizer, self.masters[group], int(offset), count, average)
                found.append(Fragment(name=name, start=begin, tensors=tensors))
        return found

    def publish(self) -> None:
        for index, master in enumerate(self.masters):
            self._wrapped.fp16_partitioned_groups_flat[index].data.copy_(master.data)
            self._wrapped._unflatten_partitioned_parameters(index)
        persistent = self._wrapped.persistent_parameters
        if persistent:  # small parameters that stay gathered: gather them again
            for parameter in persistent:
                parameter.partition()
            persistent[0].all_gather(persistent)

    def gradient_norm(self) -> torch.Tensor | None:
        return None


def shards_of(wrapped: Any, trained: Mapping[str, nn.Parameter], world: World) -> Any:
    if isinstance(wrapped, DeepSpeedZeroOptimizer_Stage3):
        return _PartitionedShards(wrapped, trained, world.rank)
    if isinstance(wrapped, DeepSpeedZeroOptimizer | BF16_Optimizer):
        return _FlatShards(wrapped, trained)
    return _ReplicatedShards(wrapped, trained)
