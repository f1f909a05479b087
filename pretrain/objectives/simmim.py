"""SimMIM (arXiv:2111.09886): hide square parts of an image, and predict their pixels from all tokens at once.

Called by train.py. What is pretrained for later use is `.backbone`; mask token and decoder are left behind.
"""

# B samples, U units of the mask, N patch embeddings, S image side, h w rows and columns of the backbone's last grid

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import ConfigError
from pretrain.keyed_random import MASK, keyed_uniform, sample_keys
from pretrain.models.backbone import Backbone


def num_masked_units(num_units: int, mask_ratio: float) -> int:
    """How many units of the mask are hidden: num_units · mask_ratio, rounded up, as the authors do.

    Raises ConfigError if that would hide all of them.
    """
    # 10 · 0.6 may be a little above 6 in binary, and means 6
    masked = math.ceil(num_units * mask_ratio - 1e-6)
    if not 0 < masked < num_units:
        raise ConfigError(
            f"objective.mask_ratio={mask_ratio} of {num_units} mask units hides {masked}; "
            f"between 1 and {num_units - 1} are needed: take another ratio, or a smaller objective.mask_patch_size"
        )
    return masked


def local_statistics(images_BCHW: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel in the square of `window` pixels around each pixel, cut off at the border.

    float32 (B, C, H, W) both; the deviation is that of a sample, of a variance with 1e-6 added: microsoft/SimMIM's
    norm_targets.
    """
    images = images_BCHW.to(torch.float32)

    def average(x_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_BCHW, window, stride=1, padding=window // 2, count_include_pad=False)

    mean_BCHW = average(images)
    variance_BCHW = (average(images * images) - mean_BCHW * mean_BCHW).clamp(min=0.0)
    ones_11HW = torch.ones_like(images[:1, :1])
    count_11HW = F.avg_pool2d(ones_11HW, window, stride=1, padding=window // 2) * window**2
    return mean_BCHW, (variance_BCHW * count_11HW / (count_11HW - 1) + 1e-6).sqrt()


class PixelHead(nn.Module):
    """One linear layer from each place of the grid to its pixels: (B, D, h, w) to (B, 3, h·stride, w·stride)."""

    def __init__(self, *, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # its outputs stand as PixelShuffle takes them: channel, row, column
        self.pred = nn.Linear(embed_dim, 3 * stride * stride)
        nn.init.trunc_normal_(self.pred.weight, std=0.02)
        nn.init.zeros_(self.pred.bias)

    def forward(self, grid_BDhw: Tensor) -> Tensor:
        B, _, h, w = grid_BDhw.shape
        p = self.stride
        pixels = self.pred(grid_BDhw.permute(0, 2, 3, 1)).reshape(B, h, w, 3, p, p)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, h * p, w * p)


class SimMIM(nn.Module):
    """Mean absolute error on the pixels of masked units, as a sum over masked units.

    Which units are masked depends on (seed, position) only. A unit is a square of `mask_patch_size` pixels; the
    embeddings of its patches are replaced by a trained mask token. Its pixels are hidden as well (set to 0, the mean
    colour), so that patches which overlap, as PVT's do, show nothing of them. Parameters: `backbone.*`,
    `mask_token`, `decoder.*`; the latter two come from torch's global generator.

    The gradient of an absolute error jumps where a prediction crosses its target: by rounding alone it may do so in one
    cut of the batch and not in another. Float32 losses of two cuts then part faster than under MAE (measured: 5e-5 of
    the loss after ten steps at a rate of 1e-3 without warmup; 2e-7 with a smooth loss in its place).

    target_window: the pixels to predict are normalised, each channel by its mean and deviation in a square of so many
    pixels a side around each; None: as they are. (The authors' NORM_TARGET.)

    Raises ConfigError for a mask or an image size that does not fit the backbone.
    """

    teacher: None = None

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        mask_ratio: float = 0.6,
        mask_patch_size: int = 32,
        target_window: int | None = None,
    ) -> None:
        super().__init__()
        side = backbone.image_size
        if backbone.pooling == "map":
            raise ConfigError(
                "model.pooling=map would not be trained by objective.name=simmim; take cls or avg"
            )
        for name, value in (
            ("objective.mask_patch_size", mask_patch_size),
            ("the backbone's stride", backbone.stride),
        ):
            if side % value:
                raise ConfigError(f"model.image_size={side} is not a multiple of {name}, {value}")
        if mask_patch_size % backbone.patch_size:
            raise ConfigError(
                f"objective.mask_patch_size={mask_patch_size} is not a multiple of the {backbone.patch_size} pixels "
                f"from patch to patch; take {math.ceil(mask_patch_size / backbone.patch_size) * backbone.patch_size}"
            )
        self.backbone = backbone
        self.seed = seed
        self.mask_patch_size = mask_patch_size
        self.target_window = target_window
        self.units = side // mask_patch_size  # a side
        self.num_masked = num_masked_units(self.units**2, mask_ratio)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dims[0]))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = PixelHead(embed_dim=backbone.embed_dim, stride=backbone.stride)

    def count(self, batch: Mapping[str, Any]) -> float:
        """What the loss sum is divided by: masked units of weighted images. Reads host `weights` (B,)."""
        return float(batch["weights"].sum()) * self.num_masked

    def forward(self, images_BCHW: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum (float32 scalar) over masked units of weighted images; no other metrics.

        images: normalised floats (B, 3, S, S), best in float32, for the targets are taken from them.
        batch, on the images' device: weights float32 (B,), positions int64 (B,).
        """
        weights_B = batch["weights"].to(torch.float32)
        pixels_BCHW, masked_BU = self._predict(images_BCHW, batch["positions"])
        # float32: differences of bf16 values lose digits where they are small
        error_BCHW = (pixels_BCHW.to(torch.float32) - self._targets(images_BCHW)).abs()
        p = self.mask_patch_size
        error_BU = error_BCHW.unflatten(3, (-1, p)).unflatten(2, (-1, p)).mean(dim=(1, 3, 5)).flatten(1)
        # where, not a product alone: a pad's error times 0 is NaN if it overflowed
        counted_BU = masked_BU & (weights_B > 0)[:, None]
        return torch.where(counted_BU, error_BU * weights_B[:, None], 0.0).sum(), {}

    @torch.no_grad()
    def reconstruct(self, images_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the network saw and what it made of it, both float32 (B, 3, S, S), normalised as the input.

        The first has zeros (the mean colour) where units are masked, the second has predicted pixels there.
        """
        was_training = self.training
        self.eval()
        try:
            pixels_BCHW, masked_BU = self._predict(images_BCHW, positions_B)
        finally:
            self.train(was_training)
        true_BCHW = images_BCHW.to(torch.float32)
        pixels_BCHW = pixels_BCHW.to(torch.float32)
        if self.target_window is not None:  # what was predicted is told beside the image's own light
            mean_BCHW, deviation_BCHW = local_statistics(images_BCHW, self.target_window)
            pixels_BCHW = pixels_BCHW * deviation_BCHW + mean_BCHW
        hidden_BCHW = self._spread(masked_BU, self.mask_patch_size)[:, None]
        return (
            torch.where(hidden_BCHW, 0.0, true_BCHW),
            torch.where(hidden_BCHW, pixels_BCHW, true_BCHW),
        )

    def _targets(self, images_BCHW: Tensor) -> Tensor:
        """The pixels to predict, float32 (B, 3, S, S): the image's, or normalised by what is around each."""
        if self.target_window is None:
            return images_BCHW.to(torch.float32)
        mean_BCHW, deviation_BCHW = local_statistics(images_BCHW, self.target_window)
        return (images_BCHW.to(torch.float32) - mean_BCHW) / deviation_BCHW

    def _predict(self, images_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted pixels (B, 3, S, S), and the masked units (B, U)."""
        keys_B = sample_keys(self.seed, positions_B)
        masked_BU = self._masked_units(keys_B)
        hidden_BHW = self._spread(masked_BU, self.mask_patch_size)
        mask_BN = self._spread(masked_BU, self.mask_patch_size // self.backbone.patch_size).flatten(1)
        seen_BCHW = torch.where(hidden_BHW[:, None], 0.0, images_BCHW)
        grid = self.backbone.patch_grid(seen_BCHW, keys_B, mask_BN=mask_BN, mask_token=self.mask_token)
        return self.decoder(grid), masked_BU

    def _masked_units(self, keys_B: Tensor) -> Tensor:
        """True for the masked units of each sample, (B, U), row by row."""
        noise_BU = keyed_uniform(keys_B, MASK, self.units**2)
        # stable: ties break alike on every device
        rank_BU = noise_BU.argsort(dim=1, stable=True).argsort(dim=1)
        return rank_BU < self.num_masked

    def _spread(self, masked_BU: Tensor, times: int) -> Tensor:
        """The mask at `times` places a unit's side, (B, units · times, units · times)."""
        mask_Buu = masked_BU.unflatten(1, (self.units, self.units))
        return mask_Buu.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
