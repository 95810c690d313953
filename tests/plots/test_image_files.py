"""Pictures carry a mark by which an earlier one may be replaced; texts are drawn as they are."""

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from PIL import Image

from src.errors import UserError
from src.files import require_replaceable
from src.plots.image_files import escape_text, is_our_picture, save_figure, save_image


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "pdf", "svg"])
def test_a_figure_may_be_replaced_and_a_foreign_picture_not(tmp_path, suffix):
    figure = Figure(figsize=(20, 20))
    figure.subplots().imshow(np.random.default_rng(0).random((300, 300)))
    ours, foreign = tmp_path / f"ours.{suffix}", tmp_path / f"foreign.{suffix}"
    save_figure(figure, ours, 50)
    figure.savefig(foreign, dpi=50)
    assert ours.stat().st_size > 20_000
    require_replaceable(ours, "--attention", is_our_picture)
    with pytest.raises(UserError, match="--attention .*not an earlier result.*--force"):
        require_replaceable(foreign, "--attention", is_our_picture)
    require_replaceable(foreign, "--attention", is_our_picture, force=True)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "pdf"])
def test_an_image_may_be_replaced_and_a_foreign_one_not(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    image = Image.fromarray(noise)
    ours, foreign = tmp_path / f"ours.{suffix}", tmp_path / f"foreign.{suffix}"
    save_image(image, ours)
    image.save(foreign)
    assert is_our_picture(ours) and not is_our_picture(foreign)


def test_a_picture_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a.png: .*give a file that can be written"):
        save_figure(Figure(), tmp_path / "file/a.png", 50)


@pytest.mark.parametrize("text", ["US$ and AU$", "$x^$", "a$b", r"a\$b$", "$$", "_x$1$", "plain"])
def test_dollars_are_drawn_and_not_read_as_mathematics(text):
    drawn = escape_text(text)
    assert is_math_text(drawn) is False
    assert drawn.replace(r"\$", "$") == text, "what matplotlib shows of it"
    figure = Figure()
    figure.suptitle(drawn)
    figure.canvas.draw()
