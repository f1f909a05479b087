"""What the loop of train.py does with batches: one optimizer step, one pass of validation. Called by train.py and
replay.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pretrain.data.augment import DeviceTransform
from pretrain.data.loader import Batch, EvalLoader
from pretrain.data.mixup import Mixing
from pretrain.distributed import Sums, sum_over_ranks
from pretrain.engine.base import Engine
from pretrain.errors import DataError
from pretrain.metrics.compute_time import ComputeTime
from pretrain.pulse import Pulse

Prepare = Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def preparing(device: torch.device, transform: DeviceTransform, mixing: Mixing | None) -> Prepare:
    """From a micro-batch on the host to images as the network sees them, and the rest of it, on the device."""

    def prepared(host_batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = to_device(host_batch, device)
        images = transform(batch["images"], batch["draws"])
        return (images, batch) if mixing is None else mixing(images, batch)

    return prepared


def take_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    prepared: Prepare,
    *,
    lr: float,
    sums: Sums,
    pulse: Pulse,
    compute: ComputeTime,
    freeze_backbone: bool = False,
) -> torch.Tensor:
    """One optimizer step on this rank's share of a global batch. Adds to `sums` what it learned of it: loss,
    count, images and the objective's metrics. Returns the gradient's global norm.

    The loss is the mean over the true global batch, however it is split: every share is divided by the one
    global count, known before the first backward. A loss that is not finite makes all gradients so, and the
    engine leaves the update out.
    """
    pulse.at("count")
    local_count = sum(engine.module.count(host_batch) for host_batch in micro_batches)
    count = sum_over_ranks(torch.tensor(local_count, dtype=torch.float64, device=engine.device))
    sums.add(count=local_count)
    for number, host_batch in enumerate(micro_batches):
        pulse.at("forward")
        with compute.measured(first=number == 0):
            images, batch = prepared(host_batch)
            loss_sum, metric_sums = engine.forward(images, batch)
        pulse.at("backward")
        loss = loss_sum / count.to(loss_sum.dtype)
        # Not while anomalies are looked for: they are to be found where they arise.
        engine.backward(loss if torch.is_anomaly_enabled() else loss * one_or_nan(loss))
        sums.add(loss=loss_sum, images=batch["weights"].sum(), **metric_sums)
    pulse.at("optimizer")
    return engine.step(lr, freeze_backbone=freeze_backbone)


def one_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """1 where the loss is finite, else NaN, on the device: gradients times it are those of a sound loss, or none."""
    return loss.detach() * 0.0 + 1.0


def to_device(batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def describe_batch(images: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> str:
    """Shapes and ranges, for whoever debugs."""
    named = {"images (normalised)": images, **batch}
    return "\n".join(
        f"first batch: {name:<20} {tensor.dtype!s:<14} {tuple(tensor.shape)!s:<20} "
        f"from {tensor.float().min():.4g} to {tensor.float().max():.4g}, mean {tensor.float().mean():.4g}"
        for name, tensor in named.items()
    )


def validate(
    engine: Engine,
    loader: EvalLoader,
    device_transform: DeviceTransform,
    pulse: Pulse,
    *,
    use_ema: bool = False,
) -> tuple[int, dict[str, float]]:
    """Mean loss and metrics over a dataset, each sample once, however many ranks there are.

    use_ema: also of the average of the weights, where the engine keeps one, as `ema_loss` and so on. Images that do
    not decode are left out, and counted. Raises DataError when none does.
    """
    unreadable, results = _validated(engine, loader, device_transform, pulse)
    if use_ema and engine.averages:
        with engine.averaged_weights():
            _, of_average = _validated(engine, loader, device_transform, pulse)
        results |= {f"ema_{name}": value for name, value in of_average.items()}
    return unreadable, results


@torch.no_grad()
def _validated(
    engine: Engine, loader: EvalLoader, device_transform: DeviceTransform, pulse: Pulse
) -> tuple[int, dict[str, float]]:
    sums = Sums(engine.device)
    engine.module.eval()
    pulse.at("validate")
    for host_batch in loader:
        pulse.at("validate")
        count = engine.module.count(host_batch)
        batch = to_device(host_batch, engine.device)
        images = device_transform(batch["images"])
        loss_sum, metric_sums = engine.forward(images, batch)
        sums.add(loss=loss_sum, count=count, images=batch["weights"].sum(), **metric_sums)
    engine.module.train()
    sums.add(unreadable=len(loader.unreadable))
    totals = sums.over_ranks()
    unreadable, count, images_seen = int(totals.pop("unreadable")), totals.pop("count"), totals.pop("images")
    if not images_seen:
        raise DataError(
            f"none of the {unreadable} images of data.val decodes; run `pretrain data verify --decode` on it"
        )
    loss = totals.pop("loss") / count
    return unreadable, {"loss": loss, **{name: total / images_seen for name, total in totals.items()}}
