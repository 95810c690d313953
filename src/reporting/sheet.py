"""A contact sheet: images with what a network takes them for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, ImageOps

from src.reporting.pictures import save_image

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf")
_COLUMNS = 8
_EDGE, _CAPTION, _GAP = 160, 44, 12  # pixels
_PAPER, _INK, _PALE, _BAR, _FAULT = "#ffffff", "#202020", "#777777", "#2c7fb8", "#c0392b"


class Tile(NamedTuple):
    """An image of the sheet.

    Args:
        file: its path.
        name: the best class; None where the image can't be read.
        probability: of that class, 0..1.
    """

    file: str
    name: str | None = None
    probability: float = 0.0


def draw_sheet(tiles: Sequence[Tile], path: Path) -> None:
    """Write a picture with a row for each eight images: image, best class, probability, file name.

    Args:
        tiles: one or more.
        path: of the picture, with one of `SHEET_SUFFIXES`.

    Raises:
        UserError: it can't be written.
    """
    columns = min(_COLUMNS, len(tiles))
    width, height = _EDGE + _GAP, _EDGE + _CAPTION + _GAP
    size = (columns * width + _GAP, math.ceil(len(tiles) / columns) * height + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    for i, tile in enumerate(tiles):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        sheet.paste(_draw_tile(tile), (left, top))
    save_image(sheet, path)


def _draw_tile(tile: Tile) -> Image.Image:
    canvas = Image.new("RGB", (_EDGE, _EDGE + _CAPTION), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if tile.name is None:
        draw.rectangle((0, 0, _EDGE - 1, _EDGE - 1), outline=_FAULT)
        caption = "not readable"
    else:
        with Image.open(tile.file) as image:
            image.draft("RGB", (2 * _EDGE, 2 * _EDGE))  # decodes a large JPEG at a fraction
            small = ImageOps.contain(image.convert("RGB"), (_EDGE, _EDGE))
        canvas.paste(small, ((_EDGE - small.width) // 2, (_EDGE - small.height) // 2))
        draw.rectangle((0, _EDGE + 2, round(tile.probability * (_EDGE - 1)), _EDGE + 5), _BAR)
        percent = f" {100 * tile.probability:.0f} %"
        caption = _shortened(tile.name, 13, percent) + percent
    draw.text((0, _EDGE + 8), caption, _FAULT if tile.name is None else _INK, _font(13))
    draw.text((0, _EDGE + 27), _shortened(Path(tile.file).name, 10), _PALE, _font(10))
    return canvas


def _shortened(text: str, size: int, behind: str = "") -> str:
    """The text, cut so that it and what comes behind fit a tile."""
    font = _font(size)
    if font.getlength(text + behind) <= _EDGE:
        return text
    while text and font.getlength(f"{text}…{behind}") > _EDGE:
        text = text[:-1]
    return f"{text}…"


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
