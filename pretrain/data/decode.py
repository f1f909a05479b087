"""Turn a compressed image into an upright RGB one, or say which image could not be. Called by augment.py.

Nothing is decoded before its compressed size and its number of pixels were held against caps. A JPEG may
be decoded at 1/2, 1/4 or 1/8 of its size, by the transform that JPEG itself is made of, when that is all
that is needed: it costs a fraction of the time.
"""

from __future__ import annotations

import io
from typing import NoReturn

import numpy as np
from PIL import Image

from pretrain.errors import DataError

MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 1024**3 // 4 // 3  # Pillow's own bound, 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow knows 40 more, and some of them start other programs
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF 2.3, tag 274: how the stored image becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture:
    """An image of which only the header was read. `size` is (width, height), upright, in pixels."""

    def __init__(
        self,
        data: bytes | memoryview,
        *,
        name: str,
        max_bytes: int = MAX_IMAGE_BYTES,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Read the header. DataError, beginning with `name`, if it is no image or above a cap."""
        self._name = name
        if len(data) > max_bytes:
            raise DataError(
                f"{name}: {len(data)} bytes of image, the most allowed is {max_bytes}; "
                "pack the images with a --max-side"
            )
        try:
            self._image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = self._image.size
        except Exception as error:
            self._fail(error)
        if width * height > max_pixels:
            raise DataError(
                f"{name}: {width}×{height} pixels, the most allowed is {max_pixels} in all; "
                "pack the images with a --max-side"
            )
        self._orientation = self._read_orientation()
        self.size = (height, width) if self._orientation >= 5 else (width, height)

    def pixels(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The upright RGB image. With `at_least` (width, height) it may come reduced, not below that size.

        DataError, beginning with the image's name, if it does not decode. May be called once.
        """
        try:
            if at_least is not None:
                wanted = at_least[::-1] if self._orientation >= 5 else at_least
                self._image.draft(None, wanted)
            self._image.load()
            image = _to_rgb(self._image)
            if self._orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[self._orientation])
        except Exception as error:
            self._fail(error)
        return image

    def _read_orientation(self) -> int:
        if self._image.format == "PNG" and "exif" not in self._image.info:
            # Pillow would decode the pixels in search of a late note, and what then goes wrong would
            # go unseen: a second attempt to decode gives black.
            return 1
        try:
            orientation = self._image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:
            return 1  # a damaged note about the image does not make the image unreadable
        return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1

    def _fail(self, error: Exception) -> NoReturn:
        # Pillow's decoders raise whatever damage makes them stumble over: OSError, SyntaxError,
        # ValueError, struct.error, zlib.error, IndexError, DecompressionBombError, …
        if isinstance(error, MemoryError):
            raise error  # the machine's fault, not the image's
        what = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            what = "not a JPEG, PNG or WebP image"
        raise DataError(
            f"{self._name}: the image does not decode: {what}; "
            "remove it from the dataset, or restore it, and index again"
        ) from error


def decode(data: bytes | memoryview, *, name: str) -> Image.Image:
    """The whole upright RGB image. DataError, beginning with `name`, if it cannot be had."""
    return Picture(data, name=name).pixels()


def _to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image. Transparency shows white, as on a page; 16-bit grey keeps its upper byte."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey PNG; Pillow's own conversion clips it at 255
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
