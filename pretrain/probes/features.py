"""Features of a frozen backbone for every sample of a loader. Called by evaluate.py before a probe."""

# B batch, N samples, D width

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.models.backbone import Backbone


class PixelTransform(Protocol):
    """uint8 images to normalised floats on the device they are on: data/augment.py's DeviceTransform."""

    def __call__(self, images_BCHW: Tensor) -> Tensor: ...


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    batches: Iterable[Mapping[str, Any]],
    device_transform: PixelTransform,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Pooled features float32 (N, D) and labels int64 (N,), on the host, in the loader's order.

    The backbone must be on `device`; it runs in evaluation mode, and is put back into the mode it
    was in. Samples of weight 0 are left out. batches: host dictionaries of images
    uint8 (B, 3, S, S), labels and weights.
    """
    device = torch.device(device)
    features, labels = [torch.zeros(0, backbone.embed_dim)], [torch.zeros(0, dtype=torch.int64)]
    was_training = backbone.training
    backbone.eval()
    try:
        for batch in batches:
            features_BD = backbone(device_transform(batch["images"].to(device, non_blocking=True)))
            real_B = batch["weights"] > 0
            features.append(features_BD.to("cpu", torch.float32)[real_B])
            labels.append(batch["labels"][real_B])
    finally:
        backbone.train(was_training)
    return torch.cat(features), torch.cat(labels)


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
