"""The contact sheet."""

import numpy as np
import pytest
from PIL import Image

from src.reporting.sheet import Tile, draw_sheet


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
