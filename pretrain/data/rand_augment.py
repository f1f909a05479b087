"""RandAugment (arXiv:1909.13719) on the host, in uint8. Called by augment.py.

The sixteen operations and their strengths are those of the paper's code (tensorflow/tpu, efficientnet's
autoaugment.py), which AugReg (arXiv:2106.10270) used: strengths are tenths, and above 10 go on in the same
line; pixels are moved without interpolation, as there. Lengths are fractions of the side, where that code has
pixels of a side of 224.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

DRAWS = 4  # numbers that one operation takes from the sample's stream: which, sign, and a place for cutout
FILL = (128, 128, 128)
_TRANSLATE = 100 / 224  # of the side, at strength 10
_CUTOUT = 40 / 224  # from the box's middle to its edge


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One operation on one image. strength: in tenths of the usual range; sign: 1 or -1."""

    image: Image.Image
    strength: float
    sign: int
    place: tuple[float, float]  # in [0, 1)


def _affine(call: _Call, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    return call.image.transform(
        call.image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.NEAREST, fillcolor=FILL
    )


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance], call: _Call) -> Image.Image:
    return kind(call.image).enhance(call.strength * 1.8 + 0.1)


def _rotate(call: _Call) -> Image.Image:
    degrees = call.sign * call.strength * 30
    return call.image.rotate(degrees, resample=Image.Resampling.NEAREST, fillcolor=FILL)


def _posterize(call: _Call) -> Image.Image:
    bits = min(8, int(call.strength * 4))
    return ImageOps.posterize(call.image, bits) if bits else Image.new("RGB", call.image.size)


def _solarize_add(call: _Call) -> Image.Image:
    amount = int(call.strength * 110)
    return call.image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


def _cutout(call: _Call) -> Image.Image:
    width, height = call.image.size
    reach = int(call.strength * _CUTOUT * width)
    x, y = int(call.place[0] * width), int(call.place[1] * height)
    image = call.image.copy()
    if reach:
        ImageDraw.Draw(image).rectangle((x - reach, y - reach, x + reach - 1, y + reach - 1), fill=FILL)
    return image


OPERATIONS: dict[str, Callable[[_Call], Image.Image]] = {
    "auto_contrast": lambda call: ImageOps.autocontrast(call.image),
    "equalize": lambda call: ImageOps.equalize(call.image),
    "invert": lambda call: ImageOps.invert(call.image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": lambda call: ImageOps.solarize(call.image, min(256, int(call.strength * 256))),
    "color": lambda call: _enhanced(ImageEnhance.Color, call),
    "contrast": lambda call: _enhanced(ImageEnhance.Contrast, call),
    "brightness": lambda call: _enhanced(ImageEnhance.Brightness, call),
    "sharpness": lambda call: _enhanced(ImageEnhance.Sharpness, call),
    "shear_x": lambda call: _affine(call, (1, call.sign * call.strength * 0.3, 0, 0, 1, 0)),
    "shear_y": lambda call: _affine(call, (1, 0, 0, call.sign * call.strength * 0.3, 1, 0)),
    "translate_x": lambda call: _affine(
        call, (1, 0, call.sign * call.strength * _TRANSLATE * call.image.width, 0, 1, 0)
    ),
    "translate_y": lambda call: _affine(
        call, (1, 0, 0, 0, 1, call.sign * call.strength * _TRANSLATE * call.image.height)
    ),
    "cutout": _cutout,
    "solarize_add": _solarize_add,
}


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`ops` operations after one another, each drawn anew. magnitude: their strength, in tenths."""

    ops: int = 2
    magnitude: float = 10.0

    @property
    def draws(self) -> int:
        return self.ops * DRAWS

    def __call__(
        self, pixels: npt.NDArray[np.uint8], draws: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.uint8]:
        """pixels: uint8 (S, S, 3); draws: float64[self.draws] in [0, 1)."""
        image = Image.fromarray(pixels)
        for which, sign, x, y in draws.reshape(self.ops, DRAWS).tolist():
            name = tuple(OPERATIONS)[math.floor(which * len(OPERATIONS))]
            image = apply(
                name, image, strength=self.magnitude / 10, sign=1 if sign < 0.5 else -1, place=(x, y)
            )
        return np.asarray(image)


def apply(
    name: str, image: Image.Image, *, strength: float, sign: int = 1, place: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """One operation by its name; strength 1 is magnitude 10."""
    return OPERATIONS[name](_Call(image=image, strength=strength, sign=sign, place=place))
