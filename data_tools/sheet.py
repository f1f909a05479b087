"""Draw images with captions into one picture. Called by stats.py."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 112  # pixels
CAPTION_HEIGHT = 16
GAP = 6
BACKGROUND, INK, BROKEN = "white", "black", "#d0d0d0"


def draw_sheet(images: Sequence[tuple[bytes, str]]) -> Image.Image:
    """A grid of (image file's content, caption), wider than high. What does not decode is a grey box."""
    columns = max(1, math.ceil(math.sqrt(len(images) * 1.4)))
    rows = math.ceil(len(images) / columns)
    step_x, step_y = CELL + GAP, CELL + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for i, (data, caption) in enumerate(images):
        left, top = GAP + i % columns * step_x, GAP + i // columns * step_y
        thumbnail = _thumbnail(data)
        offset_x, offset_y = (CELL - side for side in thumbnail.size)
        sheet.paste(thumbnail, (left + offset_x // 2, top + offset_y // 2))
        draw.text((left, top + CELL + 1), _shortened(caption, font), fill=INK, font=font)
    return sheet


def _thumbnail(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as stored:
            image = stored.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return Image.new("RGB", (CELL, CELL), BROKEN)
    scale = CELL / max(image.size)
    # Small images are enlarged without smoothing, so that their pixels can be seen.
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    width, height = image.size
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), method)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "…") > CELL:
        text = text[:-1]
    return text + "…"
