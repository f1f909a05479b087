"""Decode only the part of a JPEG that a crop needs. Called by decode.py.

Pillow decodes whole images and resizes them without vector instructions. `_jpeg_region.c`, compiled when the
package is installed where there is a C compiler, drives the libjpeg-turbo that came with Pillow so that it
transforms only the rows and columns of the crop (`_jpeg_huffman.c` reads their codes for it), and resizes by
Pillow's own arithmetic (`_resample.c`): the same bytes come out, in less than half the time. Where it was not
compiled, or Pillow's libjpeg is another, Pillow does it all.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
import PIL.Image

_SUPPORT = {"bilinear": 1, "bicubic": 2}  # of the filters, in pixels of the smaller image


class Header(NamedTuple):
    """What a JPEG's header says. plain: grey or colour of 8 bits, which `resized_part` takes."""

    width: int
    height: int
    plain: bool
    progressive: bool
    exif: bytes  # the note as Pillow's Exif.load takes it; empty if there is none


@cache
def _module() -> tuple[Any, str]:
    """The compiled part with its library open, and "" – or None, and why not."""
    try:
        module = importlib.import_module("pretrain.data._jpeg_region")
    except ImportError as error:
        return None, f"pretrain was installed without its compiled part ({error})"
    reason = "Pillow's libjpeg was not found"
    for path in _libjpegs():
        try:
            module.open(path)
        except OSError as error:
            reason = str(error)
        else:
            return module, ""
    return None, reason


def _libjpegs() -> list[str]:
    """Where the library that Pillow uses may be: bundled with its wheel, else what its import has loaded."""
    package = Path(PIL.__file__).parent
    bundled = [
        *(package.parent / "pillow.libs").glob("libjpeg*.so*"),
        *package.glob(".dylibs/libjpeg*.dylib"),
    ]
    if bundled or not sys.platform.startswith("linux"):
        return [str(path) for path in bundled]
    PIL.Image.core  # noqa: B018 - loads it
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    loaded = (line.split(maxsplit=5)[-1] for line in lines)
    return sorted({path for path in loaded if Path(path).name.startswith("libjpeg.so")})


def unavailable() -> str:
    """Why JPEGs are not decoded in part here; "" if they are."""
    return _module()[1]


def read_header(data: bytes | memoryview) -> Header:
    """Of the JPEG that `data` begins with. ValueError if it has none that libjpeg reads."""
    width, height, plain, progressive, exif = _module()[0].header(data)
    return Header(width, height, bool(plain), bool(progressive), exif)


def resized_part(
    data: bytes | memoryview,
    *,
    reduce: int,
    window: tuple[int, int, int, int],
    box: tuple[float, float, float, float],
    side: int,
    interpolation: str,
    planar: bool,
) -> npt.NDArray[np.uint8]:
    """uint8 (3, S, S) if planar, else (S, S, 3): `box` of `window` of a JPEG, antialiased. Read-only.

    reduce: the JPEG is decoded at 1/1, 1/2, 1/4 or 1/8 of its size, rounded up. window: left, top, right and
    bottom in pixels of that; box: the same, from the window's corner. ValueError if the data is damaged
    or breaks off, wherever that is.
    """
    pixels = _module()[0].region(data, reduce, window, box, side, _SUPPORT[interpolation], planar)
    return np.frombuffer(pixels, np.uint8).reshape((3, side, side) if planar else (side, side, 3))
