"""The contact sheet."""

import warnings

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from PIL import Image

from src.plots import fonts
from src.plots.confusion_matrix import draw_confusion
from src.plots.contact_sheet import Tile, draw_sheet
from src.plots.image_files import escape_text, is_our_picture


@pytest.fixture
def files(tmp_path):
    colours = [(200, 30, 30), (30, 160, 30), (30, 30, 200)]
    for i, (colour, size) in enumerate(zip(colours, [(90, 40), (400, 700), (16, 16)])):
        Image.new("RGB", size, colour).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(3)]


def test_images_lie_in_order_with_a_bar_for_the_probability(files, tmp_path):
    tiles = [Tile(file, f"class {i}", 0.25 * i) for i, file in enumerate(files)]
    draw_sheet([*tiles, Tile("broken.png")], tmp_path / "s.png")
    pixels = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
    assert pixels.shape[0] < pixels.shape[1] < 800
    parts = np.array_split(pixels[:, 6:-6], 4, axis=1)
    for channel, part in enumerate(parts[:3]):
        others = [c for c in range(3) if c != channel]
        coloured = (part[..., channel] > 120) & (part[..., others].max(-1) < 60)
        assert coloured.sum() > 1000, "the image"
    bars = [(np.abs(part - (0x2C, 0x7F, 0xB8)).max(-1) < 3).any(0).sum() for part in parts]
    assert bars[0] <= 1 and bars[1] == pytest.approx(40, abs=2)
    assert bars[2] == pytest.approx(80, abs=2) and bars[3] == 0


def test_long_names_and_many_images_fit(files, tmp_path):
    tiles = [Tile(files[i % 3], "ein sehr langer Name " * 9, 0.999) for i in range(17)]
    draw_sheet(tiles, tmp_path / "s.jpg")
    width, height = Image.open(tmp_path / "s.jpg").size
    assert 1300 < width < 1500 and 600 < height < 750


def test_the_sheet_shows_what_the_network_sees(tmp_path):
    """Upright by EXIF, of 16 bits the upper 8, CMYK as colours."""
    halves = np.zeros((160, 160, 3), np.uint8)
    halves[:, :80], halves[:, 80:] = (250, 0, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = 8  # blue above, red below
    Image.fromarray(halves).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((160, 160), 0x8040, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "gone.png").write_bytes(b"")
    tiles = [Tile(str(tmp_path / f"{name}.png"), "x", 0.0) for name in ("turned", "deep", "gone")]
    draw_sheet(tiles, tmp_path / "s.png")
    assert is_our_picture(tmp_path / "s.png")
    turned, deep, gone = (
        np.asarray(Image.open(tmp_path / "s.png"))[12:172, 12 + 172 * k : 172 * (k + 1)]
        for k in range(3)
    )
    assert (turned[:78] == (0, 0, 250)).all() and (turned[82:] == (250, 0, 0)).all()
    assert (deep == 0x80).all()
    assert (gone[5:-5, 5:-5] == 255).all(), "an empty frame"


def test_names_are_drawn_whatever_their_letters(files, tmp_path):
    names = ["\udce9t\udce9", "a\x1b[2J\nb", "$x^{", "狗"]
    for name in names:
        draw_sheet([Tile(files[0], name, 0.5)], tmp_path / "s.png")


def font_with(letters, path):
    """A font whose letters are squares."""
    pen = TTGlyphPen(None)
    for k, corner in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if k else pen.moveTo)(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square" for letter in letters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "square": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def installed(monkeypatch):
    """Stands in for the fonts of the system, which differ from machine to machine."""
    paths = []
    monkeypatch.setattr(fonts.font_manager, "findSystemFonts", lambda: paths)
    cached = (fonts._installed, fonts._font_with, fonts._warn_missing)
    for function in cached:
        function.cache_clear()
    family = matplotlib.rcParams["font.family"]
    yield paths
    matplotlib.rcParams["font.family"] = family
    for function in cached:
        function.cache_clear()


def test_chinese_names_are_drawn_in_a_font_that_has_them(files, tmp_path, installed, caplog):
    font_with("狗猫", tmp_path / "squares.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    installed += [str(tmp_path / "broken.ttf"), str(tmp_path / "squares.ttf")]
    assert fonts.find_font("dog") == fonts.default_font()
    assert fonts.find_font("狗") == str(tmp_path / "squares.ttf")
    draw_confusion(np.eye(2, dtype=int), ["狗", "猫"], tmp_path / "new.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        escape_text("狗猫")
        figure = Figure(figsize=(1, 1))
        figure.text(0.2, 0.2, escape_text("狗"), fontsize=40)
        figure.savefig(tmp_path / "square.png", dpi=100)
    dark = np.asarray(Image.open(tmp_path / "square.png").convert("L")) < 128
    assert dark.sum() > 1200, "a filled square of 39 pixels, not an empty box"
    assert caplog.text == ""


def test_a_font_of_bitmaps_is_not_taken(files, tmp_path, installed, monkeypatch, caplog):
    """Noto Color Emoji, which neither Pillow nor matplotlib can draw at the size of our text."""

    class Bitmaps:
        scalable = False

        def __init__(self, path):
            pass

        def get_charmap(self):
            return {ord("🚗"): 1}

    real = fonts.FT2Font
    monkeypatch.setattr(
        fonts, "FT2Font", lambda path: (Bitmaps if "Emoji" in str(path) else real)(path)
    )
    installed.append(str(tmp_path / "Emoji.ttf"))
    assert fonts.find_font("🚗") == fonts.default_font()
    assert "no installed font has all letters" in caplog.text


def test_names_without_a_font_are_said_once(files, tmp_path, installed, caplog):
    draw_sheet([Tile(file, "狗", 0.5) for file in files], tmp_path / "s.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(np.eye(2, dtype=int), ["狗", "猫"], tmp_path / "new.png")
    assert caplog.text.count("no installed font has all letters") == 1
