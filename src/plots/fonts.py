"""Find fonts for class and file names in any script."""

from __future__ import annotations

import functools
import logging

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

logger = logging.getLogger("cvt")

# Tried first, because a Chinese name in a Japanese font looks odd to its readers.
_PREFERRED = (
    "NotoSansCJK", "NotoSansSC", "NotoSansCJKsc", "SourceHanSansSC", "wqy-microhei", "wqy-zenhei",
    "msyh", "simhei", "PingFang", "Hiragino Sans GB", "DroidSansFallback", "Arial Unicode",
)  # fmt: skip


def default_font() -> str:
    """Return the path of DejaVu Sans, which comes with matplotlib and has most alphabets."""
    return font_manager.findfont("DejaVu Sans")


def find_font(text: str) -> str:
    """Return the path of a font for a text: the default one, or an installed one with its letters.

    If there is none, warns once; the default font then draws boxes.
    """
    missing = frozenset(map(ord, text)) - _code_points(default_font())
    missing = frozenset(code for code in missing if not chr(code).isspace())
    return _font_with(missing) if missing else default_font()


def add_fallback_font(text: str) -> None:
    """Let matplotlib draw letters that its default font lacks with an installed font."""
    path = find_font(text)
    if path == default_font():
        return
    font_manager.fontManager.addfont(path)
    name = font_manager.FontProperties(fname=path).get_name()
    if name not in matplotlib.rcParams["font.family"]:
        matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], name]


@functools.cache
def _font_with(codes: frozenset[int]) -> str:
    for path in _installed():
        if codes <= _code_points(path):
            return path
    _warn_missing()
    return default_font()


@functools.cache
def _installed() -> list[str]:
    def order(path: str) -> tuple[int, str]:
        preferred = (k for k, name in enumerate(_PREFERRED) if name.lower() in path.lower())
        return next(preferred, len(_PREFERRED)), path

    return sorted(font_manager.findSystemFonts(), key=order)


@functools.cache
def _warn_missing() -> None:
    logger.warning(
        "no installed font has all letters of the names in the pictures: some are drawn as boxes; "
        "install one, for example Noto Sans CJK for Chinese"
    )


@functools.cache
def _code_points(path: str) -> frozenset[int]:
    """Return the code points of a font; none if it can't be opened, or has bitmaps only."""
    try:
        font = FT2Font(path)
        return frozenset(font.get_charmap()) if font.scalable else frozenset()
    except (RuntimeError, OSError):
        return frozenset()
