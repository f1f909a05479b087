"""Turn a compressed image into an upright RGB one, or a part of it, or say which could not be. Called by augment.py.

Nothing is decoded before its compressed size, its number of pixels and of scans were held against caps. A JPEG
may be decoded at 1/2, 1/4 or 1/8 of its size, by the transform that JPEG itself is made of, when that is all
that is needed: it costs a fraction of the time. Pillow decodes; region.py, where it is there, does the common
kinds of JPEG faster, to the same pixels.
"""

from __future__ import annotations

import io
import math
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from pretrain.data import region
from pretrain.errors import ConfigError, DataError

Decoder = Literal["auto", "region", "pillow"]
Interpolation = Literal["bilinear", "bicubic"]

MAX_IMAGE_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 1024**3 // 4 // 3  # Pillow's own bound, 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow knows 40 more, and some of them start other programs
MAX_JPEG_SCANS = 100  # of a progressive one, each of which passes over all pixels; usual are 10
_ORIENTATION_TAG = 0x0112
_JPEG_MAGIC = b"\xff\xd8"
_START_OF_SCAN = b"\xff\xda"  # nowhere inside a scan's data
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}  # antialiased
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
_UPRIGHT = {  # EXIF 2.3, tag 274: how the stored image becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Box(NamedTuple):
    """A part of an image, in pixels from its upper left corner."""

    left: float
    top: float
    width: float
    height: float


def resolve_decoder(decoder: Decoder) -> Decoder:
    """ "region" or "pillow". ConfigError when "region" is asked for and not there."""
    reason = region.unavailable() if decoder != "pillow" else "not asked for"
    if decoder == "region" and reason:
        raise ConfigError(
            f"data.decoder=region: {reason}; install pretrain where there is a C compiler, with a Pillow wheel, "
            "or take data.decoder=auto: the pixels are the same"
        )
    return "pillow" if reason else "region"


class Picture:
    """An image of which only the header was read. `size` is (width, height), upright, in pixels."""

    def __init__(
        self,
        data: bytes | memoryview,
        *,
        name: str,
        decoder: Decoder = "auto",
        max_bytes: int = MAX_IMAGE_BYTES,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Read the header. DataError, beginning with `name`, if it is no image or above a cap."""
        self._data, self._name = data, name
        if len(data) > max_bytes:
            raise DataError(
                f"{name}: {len(data)} bytes of image, the most allowed is {max_bytes}; "
                "pack the images with a --max-side"
            )
        self._image: Image.Image | None = None
        header = self._read_jpeg_header() if decoder != "pillow" and not region.unavailable() else None
        self._in_part = header is not None and header.plain
        if header is not None:
            width, height, progressive = header.width, header.height, header.progressive
        else:
            try:
                image = self._open()
                width, height = image.size
                progressive = "progressive" in image.info
            except Exception as error:
                self._fail(error)
        if width * height > max_pixels:
            raise DataError(
                f"{name}: {width}×{height} pixels, the most allowed is {max_pixels} in all; "
                "pack the images with a --max-side"
            )
        if progressive and (scans := bytes(data).count(_START_OF_SCAN)) > MAX_JPEG_SCANS:
            raise DataError(
                f"{name}: a JPEG of {scans} scans, the most allowed is {MAX_JPEG_SCANS}; save it anew"
            )
        self._orientation = self._read_orientation(header)
        self._in_part = self._in_part and self._orientation == 1
        self.size = (height, width) if self._orientation >= 5 else (width, height)

    def pixels(self, at_least: tuple[int, int] | None = None) -> Image.Image:
        """The upright RGB image. With `at_least` (width, height) it may come reduced, not below that size.

        DataError, beginning with the image's name, if it does not decode. May be called once.
        """
        try:
            image = self._open()
            if at_least is not None:
                image.draft(None, at_least[::-1] if self._orientation >= 5 else at_least)
            image.load()
            image = _to_rgb(image)
            if self._orientation in _UPRIGHT:
                image = image.transpose(_UPRIGHT[self._orientation])
        except Exception as error:
            self._fail(error)
        return image

    def resized(
        self, box: Box, *, side: int, interpolation: Interpolation, planar: bool = True
    ) -> npt.NDArray[np.uint8]:
        """uint8 (3, S, S), or (S, S, 3) if not planar: the box, antialiased; decoded no larger than that needs.

        DataError, beginning with the image's name, if it does not decode. May be called once. Every decoder
        gives the same pixels.
        """
        W, H = self.size
        needed = math.ceil(W * side / box.width), math.ceil(H * side / box.height)
        if self._in_part:
            reduce = _reduction(self.size, needed)
            window, inner = _window_of(
                box, self.size, (-(-W // reduce), -(-H // reduce)), side=side, interpolation=interpolation
            )
            try:
                return region.resized_part(
                    self._data,
                    reduce=reduce,
                    window=window,
                    box=inner,
                    side=side,
                    interpolation=interpolation,
                    planar=planar,
                )
            except ValueError:
                pass  # Pillow is the judge of what is damaged
        image = self.pixels(at_least=needed)
        window, inner = _window_of(box, self.size, image.size, side=side, interpolation=interpolation)
        part = image.crop(window)
        # In two steps: which of them Pillow takes first in one depends on its version.
        left, top, right, bottom = inner
        filter = _RESAMPLING[interpolation]
        narrow = part.resize((side, part.height), filter, box=(left, 0, right, part.height))
        resized = np.asarray(narrow.resize((side, side), filter, box=(0, top, side, bottom)))
        return resized.transpose(2, 0, 1) if planar else resized

    def _open(self) -> Image.Image:
        if self._image is None:
            self._image = Image.open(io.BytesIO(self._data), formats=FORMATS)
        return self._image

    def _read_jpeg_header(self) -> region.Header | None:
        if bytes(self._data[:2]) != _JPEG_MAGIC:
            return None
        try:
            return region.read_header(self._data)
        except ValueError:
            return None  # Pillow says what is wrong

    def _read_orientation(self, header: region.Header | None) -> int:
        if header is not None:
            if not header.exif:
                return 1
            exif = Image.Exif()
        elif self._open().format == "PNG" and "exif" not in self._open().info:
            # Pillow would decode the pixels in search of a late note, and what then goes wrong would
            # go unseen: a second attempt to decode gives black.
            return 1
        try:
            if header is not None:
                exif.load(header.exif)
            else:
                exif = self._open().getexif()
            orientation = exif.get(_ORIENTATION_TAG, 1)
        except MemoryError:
            raise  # the machine's fault: a sample must not lie on its side for want of memory
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


def _reduction(size: tuple[int, int], at_least: tuple[int, int]) -> int:
    """By how much a JPEG may be decoded smaller, as Pillow's `draft` decides it."""
    scale = min(size[0] // at_least[0], size[1] // at_least[1])
    return next((reduce for reduce in (8, 4, 2) if scale >= reduce), 1)


def _window_of(
    box: Box, size: tuple[int, int], reduced: tuple[int, int], *, side: int, interpolation: Interpolation
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]:
    """The pixels of the reduced image that a resize of the box looks at, and the box inside that window.

    Both as left, top, right, bottom. box: in pixels of the whole image, which is `size` large.
    """
    window, inner = [], []
    for start, length, whole, small in zip(box[:2], box[2:], size, reduced, strict=True):
        scale = small / whole
        low = start * scale
        high = min(low + length * scale, small)  # min: rounding may step over the edge by 1e-13
        support = _SUPPORT[interpolation] * max(1.0, (high - low) / side)
        first = max(0, math.floor(low - support) - 1)
        last = min(small, math.ceil(high + support) + 1)
        window.append((first, last))
        inner.append((low - first, high - first))
    (x0, x1), (y0, y1) = window
    (left, right), (top, bottom) = inner
    return (x0, y0, x1, y1), (left, top, right, bottom)


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
