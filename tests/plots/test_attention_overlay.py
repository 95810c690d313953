"""The picture of attention is drawn for any number of heads and any format of image."""

import numpy as np
import pytest
from PIL import Image

from src.plots.attention_overlay import Panel, draw_attention


@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize("size", [(48, 32), (32, 64)])
def test_a_picture_is_written(tmp_path, heads, size):
    rng = np.random.default_rng(0)
    panels = [Panel(f"head {i}", rng.random(size) * 3, 0.1) for i in range(heads)]
    image = rng.random((*size, 3))
    draw_attention(image, "title", panels[0], panels[0], panels, tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert picture.shape[1] > 1000 and picture.std() > 10, "not empty"


def test_a_file_name_with_dollars_is_drawn_as_it_stands(tmp_path):
    panel = Panel("mean", np.ones((8, 8)), 0.1)
    image = np.zeros((8, 8, 3), np.uint8)
    draw_attention(image, r"$\frac$.png: US$ 5, AU$ 6", panel, panel, [panel], tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").stat().st_size > 1000
