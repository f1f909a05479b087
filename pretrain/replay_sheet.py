"""Draw the samples of a batch with captions into one picture. Called by replay.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

CELL = 128  # pixels
LINE = 15
GAP = 8
BACKGROUND, INK, FAINT, WRONG = "white", "black", "#707070", "#d02020"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """pixels: uint8 (3, S, S). title, caption: a line each. wrong: marked in red."""

    pixels: torch.Tensor
    title: str
    caption: str
    wrong: bool


def draw_sheet(samples: Sequence[Shown]) -> Image.Image:
    """A grid, wider than high, in the order given."""
    columns = max(1, math.ceil(math.sqrt(len(samples) * 1.4)))
    rows = math.ceil(len(samples) / columns)
    step_x, step_y = CELL + GAP, CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for i, sample in enumerate(samples):
        left, top = GAP + i % columns * step_x, GAP + i // columns * step_y
        picture = Image.fromarray(sample.pixels.permute(1, 2, 0).contiguous().numpy())
        # Small images are enlarged without smoothing, so that their pixels can be seen.
        method = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.LANCZOS
        sheet.paste(picture.resize((CELL, CELL), method), (left, top))
        if sample.wrong:
            draw.rectangle((left - 2, top - 2, left + CELL + 1, top + CELL + 1), outline=WRONG, width=3)
        draw.text((left, top + CELL + 1), _shortened(sample.title, font), fill=INK, font=font)
        colour = WRONG if sample.wrong else FAINT
        draw.text((left, top + CELL + LINE), _shortened(sample.caption, font), fill=colour, font=font)
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of it, which tells keys apart, if all is too long."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength("…" + text) > CELL:
        text = text[1:]
    return "…" + text
