"""Write pictures atomically, with a mark in their metadata.

The mark distinguishes earlier pictures, which may be replaced, from the user's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from src.errors import UserError, printable
from src.files import replacing, require_replaceable

if TYPE_CHECKING:  # matplotlib takes 0.5 s, which a prediction without a picture does not need
    from matplotlib.figure import Figure

PRODUCER = "cvt-mindspore"
_MARKS = (PRODUCER.encode(), PRODUCER.encode("utf-16-be"))  # PDF writers differ
_ENDS = 1 << 16  # bytes at either end of a file, where formats store metadata
_SOFTWARE = 0x0131  # EXIF's tag


def escape_text(text: str) -> str:
    """Escape a text for matplotlib, which reads `$...$` as mathematics, and add a font for it."""
    from src.plots.fonts import add_fallback_font  # loads matplotlib

    text = printable(text)
    add_fallback_font(text)
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a matplotlib figure as .png, .jpg, .jpeg, .pdf or .svg, according to the suffix.

    Raises:
        UserError: the file can't be written.
    """
    kind = Path(path).suffix.lower()
    options: dict = {"metadata": {"Software" if kind == ".png" else "Creator": PRODUCER}}
    if kind in (".jpg", ".jpeg"):
        options = {"pil_kwargs": {"exif": _exif()}}
    with _replacing(path) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # find_font has warned
        figure.savefig(unfinished, dpi=dpi, **options)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a Pillow image as .png, .jpg, .jpeg or .pdf, according to the suffix.

    Raises:
        UserError: the file can't be written.
    """
    kind = Path(path).suffix.lower()
    options: dict = {"exif": _exif()}
    if kind == ".png":
        options = {"pnginfo": PngImagePlugin.PngInfo()}
        options["pnginfo"].add_text("Software", PRODUCER)
    elif kind == ".pdf":
        options = {"creator": PRODUCER}
    with _replacing(path) as unfinished:
        image.save(unfinished, **options)


def is_our_picture(path: Path) -> bool:
    """Return whether `save_figure` or `save_image` wrote a file."""
    with open(path, "rb") as file:
        content = file.read(_ENDS)
        file.seek(max(path.stat().st_size - _ENDS, 0))
        content += file.read()
    return any(mark in content for mark in _MARKS)


def check_picture(
    path: str | Path, option: str, suffixes: Sequence[str], force: bool = False
) -> None:
    """Check that a picture can be written, before the work that it shows.

    Args:
        path: the file; an earlier picture may be replaced.
        option: the option that names it, such as "--sheet".
        suffixes: the supported suffixes.
        force: replace any existing file.

    Raises:
        UserError: the suffix is another one, or the file can't be written or replaced.
    """
    if Path(path).suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: must end in one of {' '.join(suffixes)}")
    require_replaceable(path, option, is_our_picture, force)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[_SOFTWARE] = PRODUCER
    return exif


@contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    try:
        with replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; give a file that can be written"
        ) from None
