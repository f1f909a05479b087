"""What the loop of train.py does with batches: one optimizer step. Called by train.py and replay.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from pretrain.data.augment import DeviceTransform
from pretrain.data.loader import Batch, to_device
from pretrain.data.mixup import Mixing
from pretrain.distributed import Sums, sum_over_ranks
from pretrain.engine.base import Engine
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
    compute.begin()
    pulse.at("count")
    local_count = sum(engine.module.count(host_batch) for host_batch in micro_batches)
    count = sum_over_ranks(torch.tensor(local_count, dtype=torch.float64, device=engine.device))
    sums.add(count=local_count)
    for number, host_batch in enumerate(micro_batches):
        pulse.at("forward")
        with compute.measured("forward", first=number == 0):
            images, batch = prepared(host_batch)
            loss_sum, metric_sums = engine.forward(images, batch)
        pulse.at("backward")
        with compute.measured("backward"):
            loss = loss_sum / count.to(loss_sum.dtype)
            # Not while anomalies are looked for: they are to be found where they arise.
            engine.backward(loss if torch.is_anomaly_enabled() else loss * one_or_nan(loss))
        sums.add(loss=loss_sum, images=batch["weights"].sum(), **metric_sums)
    pulse.at("optimizer")
    with compute.measured("optimizer"):
        return engine.step(lr, freeze_backbone=freeze_backbone)


def one_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """1 where the loss is finite, else NaN, on the device: gradients times it are those of a sound loss, or none."""
    return loss.detach() * 0.0 + 1.0


def describe_batch(which: str, images: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> str:
    """Shapes and ranges, for whoever debugs; `which` batch it is: "first"."""
    named = {"images (normalised)": images, **batch}
    return "\n".join(
        f"{which} batch: {name:<20} {tensor.dtype!s:<14} {tuple(tensor.shape)!s:<20} "
        f"from {tensor.float().min():.4g} to {tensor.float().max():.4g}, mean {tensor.float().mean():.4g}"
        for name, tensor in named.items()
    )
