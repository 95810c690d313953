"""Curves of a run."""

import numpy as np
import pytest
from PIL import Image

from src.plots.training_curves import plot_curves


def row(epoch, top1):
    loss = None if top1 is None else 1.0
    return {"epoch": epoch, "train_loss": 2.0 / epoch, "loss": loss, "top1": top1, "top5": top1}


@pytest.mark.parametrize("top1s", [[10.0], [10.0, None, 30.0], [None, None]])
def test_curves_are_drawn_from_what_was_evaluated(tmp_path, top1s):
    plot_curves([row(i + 1, top1) for i, top1 in enumerate(top1s)], tmp_path / "curves.png")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5
