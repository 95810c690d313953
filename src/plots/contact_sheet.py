"""Draw a contact sheet: images with their predicted classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from src.data.images import load_thumbnail
from src.errors import UserError, printable
from src.plots.image_files import save_image

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf")
_COLUMNS = 8
_EDGE, _CAPTION, _GAP = 160, 44, 12  # pixels
_BACKGROUND, _TEXT, _PALE, _BAR, _ERROR = "#ffffff", "#202020", "#777777", "#2c7fb8", "#c0392b"


class Tile(NamedTuple):
    """An image of the sheet.

    Args:
        file: its path.
        name: the best class; None if the image can't be read.
        probability: of that class, 0..1.
    """

    file: str
    name: str | None = None
    probability: float = 0.0


def draw_sheet(tiles: Sequence[Tile], path: Path) -> None:
    """Draw images with best class, probability and file name, eight per row.

    Args:
        tiles: one or more images.
        path: the file, with one of `SHEET_SUFFIXES`.

    Raises:
        UserError: the file can't be written.
    """
    columns = min(_COLUMNS, len(tiles))
    width, height = _EDGE + _GAP, _EDGE + _CAPTION + _GAP
    size = (columns * width + _GAP, math.ceil(len(tiles) / columns) * height + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    for i, tile in enumerate(tiles):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        sheet.paste(_draw_tile(tile), (left, top))
    save_image(sheet, path)


def _draw_tile(tile: Tile) -> Image.Image:
    canvas = Image.new("RGB", (_EDGE, _EDGE + _CAPTION), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    small = _load(tile)
    if small is None:
        draw.rectangle((0, 0, _EDGE - 1, _EDGE - 1), outline=_ERROR)
        draw.text((0, _EDGE + 8), "not readable", _ERROR, _font(13))
    else:
        canvas.paste(small, ((_EDGE - small.width) // 2, (_EDGE - small.height) // 2))
        draw.rectangle((0, _EDGE + 2, round(tile.probability * (_EDGE - 1)), _EDGE + 5), _BAR)
        _draw_text(draw, _EDGE + 8, tile.name, 13, _TEXT, f" {100 * tile.probability:.0f} %")
    _draw_text(draw, _EDGE + 27, Path(tile.file).name, 10, _PALE)
    return canvas


def _load(tile: Tile) -> Image.Image | None:
    """Load the image as the network sees it, upright and with 8 bits; None if unreadable."""
    if tile.name is None:
        return None
    try:
        return load_thumbnail(Path(tile.file).read_bytes(), _EDGE)
    except (OSError, UserError):  # gone or changed since it was classified
        return None


def _draw_text(
    draw: ImageDraw.ImageDraw, top: int, text: str, size: int, colour: str, suffix: str = ""
) -> None:
    """Draw a text, shortened so that it fits a tile together with its suffix."""
    text = printable(text)
    font = _font(size, text)
    if font.getlength(text + suffix) > _EDGE:
        while text and font.getlength(f"{text}…{suffix}") > _EDGE:
            text = text[:-1]
        text += "…"
    draw.text((0, top), text + suffix, colour, font)


def _font(size: int, text: str = "") -> ImageFont.FreeTypeFont:
    from src.plots.fonts import find_font  # loads matplotlib

    return ImageFont.truetype(find_font(text), size)
