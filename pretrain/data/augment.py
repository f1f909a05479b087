"""Turn images into network inputs: the costly half on the host, the rest in batches on the device.

Host: decode, crop, resize, to uint8 (3, S, S); and the random numbers for the rest, drawn from the sample's
own stream, which travel with it. Device: flip, colour, normalise.
Called by loader.py (host) and the training and evaluation loops (device).
"""

# B batch, S side of the network's input, H and W height and width

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pretrain.data.decode import Box, Decoder, Interpolation, Picture
from pretrain.data.keyed import KeyedRandom

Augmentation = Literal["random_resized_crop", "center_crop"]

CROP_TRIES = 10  # torchvision.transforms.RandomResizedCrop
CENTER_FRACTION = 0.875  # 224 of 256, the usual evaluation crop
DEVICE_DRAWS = 4  # the first numbers of a sample's stream: flip, brightness, contrast, saturation
_NO_DRAWS = np.zeros(0, np.float32)


class HostSample(NamedTuple):
    """One image as the host leaves it."""

    pixels: npt.NDArray[np.uint8]  # (3, S, S)
    draws: npt.NDArray[np.float32]  # (device_draws,) in [0, 1), for the device's half; see DeviceTransform


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop of one training image, drawn from its position's stream, and draws for the device's half.

    crop_scale: area of the crop as a fraction of the image; crop_ratio: its width over its height.
    interpolation: bilinear as torchvision's default, a fifth faster from JPEG to crop than bicubic.
    """

    image_size: int
    augmentation: Augmentation = "random_resized_crop"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    decoder: Decoder = "auto"
    device_draws: ClassVar[int] = DEVICE_DRAWS

    def __call__(self, data: bytes | memoryview, *, name: str, random: KeyedRandom) -> HostSample:
        """`random` stands at the start of the sample's stream. DataError, with `name`, if undecodable."""
        # Everything is drawn at once: later draws do not move when an earlier choice needs more tries.
        draws = random.uniform(DEVICE_DRAWS + 4 * CROP_TRIES)
        picture = Picture(data, name=name, decoder=self.decoder)
        if self.augmentation == "center_crop":
            box = center_box(picture.size, image_size=self.image_size)
        else:
            tries = draws[DEVICE_DRAWS:].reshape(CROP_TRIES, 4)
            box = random_box(picture.size, scale=self.crop_scale, ratio=self.crop_ratio, draws=tries)
        pixels = picture.resized(box, side=self.image_size, interpolation=self.interpolation)
        return HostSample(pixels=pixels, draws=draws[:DEVICE_DRAWS].astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The centre of the image, whole for images no larger than the input. Draws nothing."""

    image_size: int
    interpolation: Interpolation = "bicubic"  # timm's for evaluating ViTs
    decoder: Decoder = "auto"
    device_draws: ClassVar[int] = 0

    def __call__(
        self, data: bytes | memoryview, *, name: str, random: KeyedRandom | None = None
    ) -> HostSample:
        """DataError, with `name`, if undecodable."""
        picture = Picture(data, name=name, decoder=self.decoder)
        box = center_box(picture.size, image_size=self.image_size)
        pixels = picture.resized(box, side=self.image_size, interpolation=self.interpolation)
        return HostSample(pixels=pixels, draws=_NO_DRAWS)


def random_box(
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: npt.NDArray[np.float64],
) -> Box:
    """torchvision's RandomResizedCrop.get_params: ten tries, then the largest centre crop of a fair ratio.

    size: (width, height); draws: float64[tries, 4] in [0, 1).
    """
    W, H = size
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws.tolist():
        area = W * H * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= W and 0 < height <= H:
            return Box(int(left_draw * (W - width + 1)), int(top_draw * (H - height + 1)), width, height)
    if ratio[0] > W / H:
        width, height = W, max(1, round(W / ratio[0]))
    elif ratio[1] < W / H:
        width, height = max(1, round(H * ratio[1])), H
    else:
        width, height = W, H
    return Box((W - width) // 2, (H - height) // 2, width, height)


def center_box(size: tuple[int, int], *, image_size: int) -> Box:
    """The centre square: 0.875 of the shorter side where that is above image_size, else all of it."""
    shorter = min(size)
    side = shorter * CENTER_FRACTION if shorter > image_size else float(shorter)
    return Box((size[0] - side) / 2, (size[1] - side) / 2, side, side)


class DeviceTransform:
    """Flip, brightness, contrast, saturation, normalise: a batch at a time, without a host sync.

    mean, std: of each channel, in units of the full range. horizontal_flip: probability. color_jitter:
    factors are drawn from [max(0, 1 - c), 1 + c]; 0 leaves the colour steps out.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        horizontal_flip: float = 0.5,
        color_jitter: float = 0.0,
    ) -> None:
        self.horizontal_flip, self.color_jitter = horizontal_flip, color_jitter
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]

    def __call__(self, images_BCHW: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 (B, 3, S, S) and float32 (B, DEVICE_DRAWS), on one device -> float32 (B, 3, S, S).

        Without draws, as in evaluation, the images are only normalised.
        """
        if draws is not None:
            flips = draws[:, 0] < self.horizontal_flip
            images_BCHW = torch.where(flips[:, None, None, None], images_BCHW.flip(-1), images_BCHW)
        x = images_BCHW.to(torch.float32) / 255  # float32: bf16 has fewer steps than a byte near 1
        if draws is not None and self.color_jitter:
            low = max(0.0, 1.0 - self.color_jitter)
            x = _jitter_color(x, low + (1.0 + self.color_jitter - low) * draws[:, 1:4])
        if self._mean.device != x.device:  # once: such a copy waits for the device
            self._mean, self._std = self._mean.to(x.device), self._std.to(x.device)
        return (x - self._mean) / self._std


def _jitter_color(x: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    """torchvision's adjust_brightness, adjust_contrast and adjust_saturation, in this order."""
    brightness, contrast, saturation = jitter[:, :, None, None, None].unbind(1)
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(_grey(x).mean(dim=(1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
    return torch.lerp(_grey(x), x, saturation).clamp(0, 1)


def _grey(x: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) luma, ITU-R BT.601 as torchvision's rgb_to_grayscale."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)
