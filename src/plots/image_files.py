"""Write pictures whole, marked as this program's, with the user's texts as they stand.

A mark in the file's metadata tells an earlier picture from the user's own, which is not replaced.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from src.errors import UserError, printable
from src.files import replacing

if TYPE_CHECKING:  # matplotlib takes 0.5 s, which a prediction without a picture does not need
    from matplotlib.figure import Figure

PRODUCER = "cvt-mindspore"
_MARKS = (PRODUCER.encode(), PRODUCER.encode("utf-16-be"))  # PDF writers differ
_ENDS = 1 << 16  # bytes at either end of a file, where formats keep their metadata
_SOFTWARE = 0x0131  # EXIF's tag


def literal(text: str) -> str:
    """A text that matplotlib draws as it stands, in a font that has its letters.

    Without this, `$...$` is read as mathematics.
    """
    from src.plots.fonts import draw_with_font_for

    text = printable(text)
    draw_with_font_for(text)
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a matplotlib figure; the suffix (.png, .jpg, .jpeg, .pdf or .svg) decides the format.

    Raises:
        UserError: it can't be written.
    """
    kind = Path(path).suffix.lower()
    options: dict = {"metadata": {"Software" if kind == ".png" else "Creator": PRODUCER}}
    if kind in (".jpg", ".jpeg"):
        options = {"pil_kwargs": {"exif": _exif()}}
    with _written(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `find_font` has said it
        figure.savefig(unfinished, dpi=dpi, **options)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a Pillow image; the suffix (.png, .jpg, .jpeg or .pdf) decides the format.

    Raises:
        UserError: it can't be written.
    """
    kind = Path(path).suffix.lower()
    options: dict = {"exif": _exif()}
    if kind == ".png":
        options = {"pnginfo": PngImagePlugin.PngInfo()}
        options["pnginfo"].add_text("Software", PRODUCER)
    elif kind == ".pdf":
        options = {"creator": PRODUCER}
    with _written(path) as unfinished:
        image.save(unfinished, **options)


def is_picture_of_ours(path: Path) -> bool:
    """Whether `save_figure` or `save_image` wrote a file."""
    with open(path, "rb") as file:
        content = file.read(_ENDS)
        file.seek(max(path.stat().st_size - _ENDS, 0))
        content += file.read()
    return any(mark in content for mark in _MARKS)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[_SOFTWARE] = PRODUCER
    return exif


@contextmanager
def _written(path: str | Path) -> Iterator[Path]:
    try:
        with replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; give a file that can be written"
        ) from None
