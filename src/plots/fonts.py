"""Fonts for texts that come from the user: class and file names in any script."""

from __future__ import annotations

import functools
import logging

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

logger = logging.getLogger("cvt")

# Tried first; a Chinese name in a Japanese font is legible, but not as a reader expects it.
_USUAL = (
    "NotoSansCJK", "NotoSansSC", "NotoSansCJKsc", "SourceHanSansSC", "wqy-microhei", "wqy-zenhei",
    "msyh", "simhei", "PingFang", "Hiragino Sans GB", "DroidSansFallback", "Arial Unicode",
)  # fmt: skip


def default_font() -> str:
    """The path of DejaVu Sans, which comes with matplotlib and knows most alphabets."""
    return font_manager.findfont("DejaVu Sans")


def find_font(text: str) -> str:
    """The path of a font for a text: the default one, or an installed one that has its letters.

    Says once if there is none; the default font draws boxes then.
    """
    missing = frozenset(map(ord, text)) - _letters(default_font())
    missing = frozenset(code for code in missing if not chr(code).isspace())
    return _font_with(missing) if missing else default_font()


def draw_with_font_for(text: str) -> None:
    """Let matplotlib take letters that its default font lacks from an installed font."""
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
        if codes <= _letters(path):
            return path
    _say_missing()
    return default_font()


@functools.cache
def _installed() -> list[str]:
    def order(path: str) -> tuple[int, str]:
        usual = (k for k, name in enumerate(_USUAL) if name.lower() in path.lower())
        return next(usual, len(_USUAL)), path

    return sorted(font_manager.findSystemFonts(), key=order)


@functools.cache
def _say_missing() -> None:
    logger.warning(
        "no installed font has all letters of the names in the pictures: some are drawn as boxes; "
        "install one, as Noto Sans CJK for Chinese"
    )


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Code points of a font; none of one that can't be opened."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()
