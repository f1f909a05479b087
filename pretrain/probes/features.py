"""Features of a frozen backbone for every sample of a loader. Called by suite.py before a probe."""

# B batch, N samples, D width, h and w patches down and across

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.errors import DataError

Moved = Callable[[], None]  # told between pieces of long work
PatchSink = Callable[[Tensor, Tensor], None]  # patch features (B, D, h, w) and the images' labels (B,)


def not_said() -> None:
    """A `Moved` for who works alone: nobody waits to hear of it."""


class PixelTransform(Protocol):
    """uint8 images to normalised floats on the device they are on: data/augment.py's DeviceTransform."""

    def __call__(self, images_BCHW: Tensor) -> Tensor: ...


class Backbone(Protocol):
    """What a probe asks of a network."""

    embed_dim: int
    training: bool

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        ...

    def patch_grid(self, images_BCHW: Tensor) -> Tensor:
        """The last map of patch features (B, D, h, w)."""
        ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    batches: Iterable[Mapping[str, Any]],
    device_transform: PixelTransform,
    device: torch.device | str,
    *,
    patches: PatchSink | None = None,
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    moved: Moved = not_said,
) -> tuple[Tensor, Tensor]:
    """Pooled features float32 (N, D) and labels int64 (N,), on the host, in the loader's order.

    The backbone must be on `device`; it runs in evaluation mode, and is put back into the mode it
    was in. Samples of weight 0 are left out. batches: host dictionaries of images
    uint8 (B, 3, S, S), labels and weights. Whatever they hold, each costs the same forwards on every rank.

    patches: also gets each batch's patch features, which takes a second forward; its labels, on the device, are
    -1 for samples of weight 0. reading: the context of a forward (`Engine.reading`). moved: called at each batch.
    """
    device = torch.device(device)
    features, labels = [], [torch.zeros(0, dtype=torch.int64)]
    was_training = backbone.training
    backbone.eval()
    try:
        for batch in batches:
            moved()
            images = device_transform(batch["images"].to(device, non_blocking=True))
            with reading():
                features_BD = backbone.features(images)
            real_B = batch["weights"] > 0
            features.append(features_BD.to("cpu", torch.float32)[real_B])
            labels.append(batch["labels"][real_B])
            if patches is not None:
                with reading():
                    grid_BDhw = backbone.patch_grid(images)
                patches(grid_BDhw, torch.where(real_B, batch["labels"], -1).to(device))
    finally:
        backbone.train(was_training)
    if not features:
        features.append(torch.zeros(0, backbone.embed_dim))
    return torch.cat(features), torch.cat(labels)


def mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) of each feature of (N, D); a deviation of 1 for one that never changes."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean, torch.where(constant, 1.0, std)


def check_probe_data(features: Tensor, labels: Tensor, *, name: str) -> None:
    """Raise DataError if there are no samples, or samples without a label; `name` says whose they are."""
    if len(features) == 0:
        raise DataError(f"the probe's {name} data: got no samples; name a dataset with some")
    if bool((labels < 0).any()):
        missing = int((labels < 0).sum())
        raise DataError(
            f"the probe's {name} data: {missing} of {len(labels)} samples have no label; "
            f"pack them with labels, or probe on a labelled dataset"
        )
