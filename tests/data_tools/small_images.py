"""Image files of noise, for tests."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def image_bytes(seed: int, *, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    """An image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
