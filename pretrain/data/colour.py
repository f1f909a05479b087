"""Augmentation of whole batches on the device: colour, 3-Augment, erasing. Called by augment.py's DeviceTransform.

What happens to a sample is decided by numbers that came with it from the host; nothing here waits for the device.
"""

# B batch, S side

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pretrain.keyed_random import ERASING, keyed_uniform

SOLARIZE_FROM = 128 / 255  # PIL.ImageOps.solarize
BLUR_SIGMA = (0.1, 2.0)  # DeiT-III, github.com/facebookresearch/deit augment.py
_BLUR_RADIUS = math.ceil(3 * BLUR_SIGMA[1])


def jitter_color(x: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    """torchvision's adjust_brightness, adjust_contrast and adjust_saturation, in this order.

    x: (B, 3, S, S) in [0, 1]; jitter: (B, 3) factors.
    """
    brightness, contrast, saturation = jitter[:, :, None, None, None].unbind(1)
    x = (x * brightness).clamp(0, 1)
    x = torch.lerp(grey(x).mean(dim=(1, 2, 3), keepdim=True), x, contrast).clamp(0, 1)
    return torch.lerp(grey(x), x, saturation).clamp(0, 1)


def grey(x: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, S) luma, ITU-R BT.601 as torchvision's rgb_to_grayscale."""
    red, green, blue = x.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def three_augment(x: torch.Tensor, choice: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """One of grey, solarised and blurred for each image (arXiv:2204.07118).

    x: (B, 3, S, S) in [0, 1]; choice, sigma: (B,) in [0, 1).
    """
    which = (choice * 3)[:, None, None, None]
    low, high = BLUR_SIGMA
    blurred = gaussian_blur(x, low + (high - low) * sigma)
    solarized = torch.where(x >= SOLARIZE_FROM, 1.0 - x, x)
    return torch.where(which < 1, grey(x).expand_as(x), torch.where(which < 2, solarized, blurred))


def gaussian_blur(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x (B, 3, S, S) blurred by sigma (B,) pixels, its edges repeated outwards."""
    B, C, S, _ = x.shape
    place = torch.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(C, dim=0, output_size=B * C)
    rows = F.pad(x, (_BLUR_RADIUS,) * 4, mode="replicate").reshape(1, B * C, S + 2 * _BLUR_RADIUS, -1)
    rows = F.conv2d(rows, kernel[:, None, None, :], groups=B * C)
    return F.conv2d(rows, kernel[:, None, :, None], groups=B * C).reshape(B, C, S, S)


def erase(x: torch.Tensor, boxes: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Noise of mean 0 and deviation 1 in place of each image's box, as timm's RandomErasing in mode "pixel".

    x: (B, 3, S, S), normalised. boxes: (B, 4) top, left, height and width as fractions of S; a height of 0
    leaves the image as it is. seeds: (B, 2) in [0, 1), from which the noise follows.
    """
    B, C, S, _ = x.shape
    top, left, height, width = (boxes * S).round().unbind(1)
    place = torch.arange(S, device=x.device)
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    words = (seeds.to(torch.float64) * 2**24).to(torch.int64)
    uniform = keyed_uniform(words[:, 0] * 2**24 + words[:, 1], ERASING, 2 * C * S * S).reshape(B, 2, C, S, S)
    # Box and Muller
    noise = (-2.0 * torch.log1p(-uniform[:, 0])).sqrt() * torch.cos(2 * math.pi * uniform[:, 1])
    return torch.where(inside, noise.to(x.dtype), x)
