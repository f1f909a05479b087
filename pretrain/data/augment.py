"""Turn images into network inputs: the costly half on the host, the rest in batches on the device.

Host: decode, crop, resize, RandAugment, to uint8 (3, S, S); and the random numbers for the rest, drawn from the
sample's own stream, which travel with it. Device: flip, 3-Augment, colour, normalise, erase; mixup.py comes after.
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

from pretrain.data.colour import erase, jitter_color, three_augment
from pretrain.data.decode import Box, Decoder, Interpolation, Picture
from pretrain.data.keyed import KeyedRandom
from pretrain.data.rand_augment import RandAugment

Augmentation = Literal["random_resized_crop", "center_crop"]

CROP_TRIES = 10  # torchvision.transforms.RandomResizedCrop
CENTER_FRACTION = 0.875  # 224 of 256, the usual evaluation crop
ERASE_TRIES = 10  # timm.data.random_erasing.RandomErasing, and the next two
ERASE_AREA = (0.02, 1 / 3)  # of the image
ERASE_RATIO = (0.3, 1 / 0.3)  # height over width

# A sample's stream, in its order. What comes later moves nothing that comes earlier.
_FIRST = slice(0, 4)  # flip, brightness, contrast, saturation
_CROP = slice(4, 4 + 4 * CROP_TRIES)
_THREE = slice(_CROP.stop, _CROP.stop + 2)  # which, and the blur's strength
_ERASE = slice(_THREE.stop, _THREE.stop + 1 + 4 * ERASE_TRIES)  # whether, and where
_NOISE = slice(_ERASE.stop, _ERASE.stop + 2)  # the erased box's own seed
_RAND_AUGMENT = _NOISE.stop

# What of it the device gets: the first four, 3-Augment's two, the box to erase (top, left, height, width as
# fractions of the side; a height of 0: none), and the noise's two.
DEVICE_DRAWS = 12
_NO_DRAWS = np.zeros(0, np.float32)


class HostSample(NamedTuple):
    """One image as the host leaves it."""

    pixels: npt.NDArray[np.uint8]  # (3, S, S)
    draws: npt.NDArray[np.float32]  # (device_draws,) in [0, 1], for the device's half; see DEVICE_DRAWS


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop of one training image, drawn from its position's stream, and draws for the device's half.

    crop_scale: area of the crop as a fraction of the image; crop_ratio: its width over its height.
    interpolation: bilinear as torchvision's default, a fifth faster from JPEG to crop than bicubic.
    erasing: probability that the device erases a box of it.
    """

    image_size: int
    augmentation: Augmentation = "random_resized_crop"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    decoder: Decoder = "auto"
    rand_augment: RandAugment | None = None
    erasing: float = 0.0
    device_draws: ClassVar[int] = DEVICE_DRAWS

    def __call__(self, data: bytes | memoryview, *, name: str, random: KeyedRandom) -> HostSample:
        """`random` stands at the start of the sample's stream. DataError, with `name`, if undecodable."""
        # Everything is drawn at once: later draws do not move when an earlier choice needs more tries.
        rand_augment = self.rand_augment
        draws = random.uniform(_RAND_AUGMENT + (rand_augment.draws if rand_augment else 0))
        picture = Picture(data, name=name, decoder=self.decoder)
        if self.augmentation == "center_crop":
            box = center_box(picture.size, image_size=self.image_size)
        else:
            tries = draws[_CROP].reshape(CROP_TRIES, 4)
            box = random_box(picture.size, scale=self.crop_scale, ratio=self.crop_ratio, draws=tries)
        planar = rand_augment is None
        pixels = picture.resized(box, side=self.image_size, interpolation=self.interpolation, planar=planar)
        if rand_augment is not None:
            pixels = rand_augment(pixels, draws[_RAND_AUGMENT:]).transpose(2, 0, 1)
        erased = erase_box(self.image_size, probability=self.erasing, draws=draws[_ERASE])
        parts = draws[_FIRST], draws[_THREE], np.array(erased) / self.image_size, draws[_NOISE]
        return HostSample(pixels=pixels, draws=np.concatenate(parts).astype(np.float32))


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


def erase_box(side: int, *, probability: float, draws: npt.NDArray[np.float64]) -> tuple[int, int, int, int]:
    """timm's RandomErasing: top, left, height, width of what is erased, in pixels; all 0 for nothing.

    draws: float64[1 + 4 * ERASE_TRIES] in [0, 1).
    """
    if draws[0] >= probability:
        return 0, 0, 0, 0
    log_low, log_high = math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws[1:].reshape(ERASE_TRIES, 4).tolist():
        area = side * side * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area_draw)
        ratio = math.exp(log_low + (log_high - log_low) * ratio_draw)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < side and width < side:
            return int(top_draw * (side - height + 1)), int(left_draw * (side - width + 1)), height, width
    return 0, 0, 0, 0


def center_box(size: tuple[int, int], *, image_size: int) -> Box:
    """The centre square: 0.875 of the shorter side where that is above image_size, else all of it."""
    shorter = min(size)
    side = shorter * CENTER_FRACTION if shorter > image_size else float(shorter)
    return Box((size[0] - side) / 2, (size[1] - side) / 2, side, side)


class DeviceTransform:
    """Flip, 3-Augment, brightness, contrast, saturation, normalise, erase: a batch at a time, without a host sync.

    mean, std: of each channel, in units of the full range. horizontal_flip: probability. color_jitter:
    factors are drawn from [max(0, 1 - c), 1 + c]; 0 leaves the colour steps out. erases: whether the
    draws may hold boxes to erase.
    """

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        horizontal_flip: float = 0.5,
        color_jitter: float = 0.0,
        three_augment: bool = False,
        erases: bool = False,
    ) -> None:
        self.horizontal_flip, self.color_jitter = horizontal_flip, color_jitter
        self.three_augment, self.erases = three_augment, erases
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
        if draws is not None and self.three_augment:
            x = three_augment(x, draws[:, 4], draws[:, 5])
        if draws is not None and self.color_jitter:
            low = max(0.0, 1.0 - self.color_jitter)
            x = jitter_color(x, low + (1.0 + self.color_jitter - low) * draws[:, 1:4])
        if self._mean.device != x.device:  # once: such a copy waits for the device
            self._mean, self._std = self._mean.to(x.device), self._std.to(x.device)
        x = (x - self._mean) / self._std
        if draws is not None and self.erases:
            x = erase(x, draws[:, 6:10], draws[:, 10:12])
        return x
