"""Many ranks: the step through DeepSpeed ZeRO, stages 0 to 3. Chosen by train.py when launched.

DeepSpeed divides by the world size when it reduces gradients, and wants to divide by the number
of micro-batches; our losses already are shares of one global mean, so both are undone here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from pydantic import ValidationError
from torch import nn

from pretrain.distributed import World, barrier, sum_over_ranks
from pretrain.engine.cpu_bf16 import bf16_products
from pretrain.engine.fragments import (
    Fragment,
    get_optimizer_steps,
    prepare_state,
    set_optimizer_steps,
    share,
)
from pretrain.engine.shards import shards_of
from pretrain.engine.teacher import average_copy, check_teacher
from pretrain.errors import AskedToStopError, UsageError
from pretrain.objectives.contract import Objective, as_module
from pretrain.optim.ema import WeightAverage
from pretrain.optim.lamb import Lamb
from pretrain.optim.muon import Muon
from pretrain.optim.parameter_groups import set_learning_rates

# DeepSpeed's own 5e8 elements exceed all of ViT-Large: one bucket, two gigabytes of buffer, and
# nothing to overlap with.
BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(
    user: Mapping[str, Any],
    *,
    precision: str,
    micro_batch_size: int,
    accumulation_steps: int,
    world_size: int,
    clip_grad_norm: float | None,
    num_parameters: int,
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """The user's own `deepspeed:` keys, with those that the recipe decides added to them. Raises UsageError."""
    bucket = min(BUCKET_ELEMENTS, -(-num_parameters // 4096) * 4096)  # of a size that DeepSpeed can align
    zero = {
        "stage": 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        **user.get("zero_optimization", {}),
    }
    if zero["stage"] == 3:
        zero.pop("allgather_bucket_size", None)  # stages 1 and 2 only
    config = {
        "steps_per_print": 10**9,  # the journal reports steps
        **user,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "gradient_clipping": clip_grad_norm or 0.0,
        # without the check, stages 1 and 2 update with NaN
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
    }
    if precision == "bf16" and accumulation_steps > 1:
        if zero["stage"] == 0:
            raise UsageError(
                "ZeRO stage 0 in bf16 would add up micro-batches in bf16; take "
                "deepspeed.zero_optimization.stage=1, train.precision=float32, or one micro-batch a step"
            )
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if optimizer == "muon" and zero["stage"] == 1:  # what its Muon on float32 shards asks for
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if optimizer == "lamb":
        config["zero_allow_untested_optimizer"] = True  # it is ours, and tested here
    return config


class ZeroEngine:
    """See engine/base.py for the contract."""

    def __init__(
        self,
        objective: Objective,
        *,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: Mapping[str, Any],
        world: World,
        build_average: Callable[[list[torch.Tensor]], WeightAverage] | None = None,
    ) -> None:
        """`objective`'s float32 weights become the masters as they are, without a detour by bf16."""
        initial = {name: p.detach().clone() for name, p in objective.named_parameters() if p.requires_grad}
        objective.to(world.device)
        _leave_out_shared_memory_collective()
        _quieten()
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        self.zero_stage = int(config["zero_optimization"]["stage"])
        check_teacher(objective, zero_stage=self.zero_stage, averages=build_average is not None)
        optimizer = build_optimizer(as_module(objective))
        if isinstance(optimizer, Muon) and self.zero_stage > 0:
            optimizer = _muon_of_shards(optimizer)
        try:
            self._engine, self._wrapped, _, _ = deepspeed.initialize(
                model=objective,
                optimizer=optimizer,
                config=dict(config),
                dist_init_required=False,
            )
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UsageError(f"DeepSpeed refuses what stands under deepspeed: {error}") from None
        assert self._engine.world_size == world.world_size, "DeepSpeed joined another world than asked for"
        self._world = world
        self.module: Any = objective
        self.device = world.device
        self._is_bf16 = bool(config["bf16"]["enabled"])
        self.skipped = False
        self._trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self._shards = shards_of(self._wrapped, self._trained, world)
        prepare_state(self._shards.optimizer, self._shards.masters)
        if isinstance(optimizer, Lamb) and self.zero_stage > 0:
            optimizer.bind(self._shards.pieces(), sum_over_ranks)
        self._average = build_average(self._shards.masters) if build_average else None
        self.averages = self._average is not None
        self._updates = 0  # as the optimizer counts them, on the host
        for fragment in self.fragments():
            source = initial[fragment.name].view(-1).narrow(0, fragment.start, fragment.count)
            fragment.tensors["weight"].copy_(source)
        if self._average is not None:
            self._average.restart()
        self._teacher = average_copy(
            objective, self.fragments(), world=None if self.zero_stage == 0 else world
        )
        self.publish_weights()

    def forward(self, images: torch.Tensor, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with bf16_products(self.device, enabled=self._is_bf16):
            return self._engine(images, batch)

    @contextmanager
    def reading(self) -> Iterator[None]:
        if self.zero_stage == 3:
            # The hooks of each submodule gather its weights, but only those of the whole module begin a new forward:
            # without that, the order of submodules that DeepSpeed learns for its prefetching would grow and grow.
            self._wrapped.parameter_offload.get_param_coordinator().reset_step()
        with bf16_products(self.device, enabled=self._is_bf16):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        with bf16_products(self.device, enabled=self._is_bf16):
            self._engine.backward(loss * self._world.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro-batch

    def step(self, lr: float, *, freeze_backbone: bool = False) -> torch.Tensor:
        set_learning_rates(self._shards.optimizer.param_groups, lr, freeze_backbone=freeze_backbone)
        norm = self._shards.gradient_norm()
        if norm is None:
            # DeepSpeed measures it on the way, and leaves out an update with one that is not finite
            self._engine.step()
            self.skipped = bool(self._wrapped.overflow)
            norm = float("inf") if self.skipped else self._engine.get_global_grad_norm()
        else:
            self.skipped = not bool(torch.isfinite(norm))
            with self._shards.without_update() if self.skipped else nullcontext():
                self._engine.step()
        if not self.skipped:
            self._updates += 1
            if self._average is not None:
                self._average.update(self._updates)
            if self._teacher is not None:
                self._teacher.refresh()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device).detach()

    def fragments(self) -> list[Fragment]:
        return self._shards.fragments(self._average)

    def owned_fragments(self) -> list[Fragment]:
        fragments = self.fragments()
        if self.zero_stage == 0:
            return share(fragments, self._world.rank, self._world.world_size)
        return fragments

    def replicated_weights(self) -> dict[str, torch.Tensor]:
        if self.zero_stage == 3:
            return {}
        return {name: parameter.detach().view(-1) for name, parameter in self._trained.items()}

    def publish_weights(self) -> None:
        self._publish()
        if self._teacher is not None:
            self._teacher.refresh()

    def _publish(self) -> None:
        self._shards.publish()
        barrier()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        assert self._average is not None, "the run keeps an average"
        self._average.swap()
        self._publish()
        by_all = True
        try:
            yield
        except BaseException as error:
            # What all ranks gave up together the run goes on after; another error may be this rank's alone, and its
            # peers would be waited for.
            by_all = isinstance(error, AskedToStopError)
            raise
        finally:
            self._average.swap()
            if by_all:
                self._publish()

    @property
    def optimizer_steps(self) -> int:
        return get_optimizer_steps(self._shards.optimizer)

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        set_optimizer_steps(self._shards.optimizer, steps)
        self._updates = steps


def _muon_of_shards(optimizer: Muon) -> torch.optim.Optimizer:
    """DeepSpeed's own Muon of the same groups: it orthogonalises whole matrices that ranks hold in parts."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # compiles its kernels at import

    groups = [{**group} for group in optimizer.param_groups]
    for group in groups:
        if group["use_muon"]:
            group["ns_method"] = "standard"  # the iteration that torch's does; `gram` runs in half precision
    return MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=optimizer.aux_settings
    )


def _quieten() -> None:
    """Keep DeepSpeed's running commentary, and torch's about DeepSpeed's calls, out of the run's output."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    for module in ("torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def _leave_out_shared_memory_collective() -> None:
    """Let CPU ranks talk through gloo alone.

    DeepSpeed's own collective for CPUs is compiled at first use, under a lock file that a process
    killed meanwhile leaves behind: every later run waits for it for ever. It also spins on flags of
    its peers, and so never notices that one has died; gloo does, at once.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
