"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from src.plots.image_files import literal, save_figure

MOST_NAMES = 50  # classes whose names are legible beside the picture
_MOST_NUMBERS = 20
_LONGEST = 20  # letters of a name


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw each class's predictions as shares of its images; no names above `MOST_NAMES`.

    Args:
        matrix: images by label (rows) and prediction (columns), int [C, C].
        names: of the classes.
        path: of the picture.

    Raises:
        UserError: it can't be written.
    """
    classes = len(matrix)
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = classes <= MOST_NAMES
    # Before any axes, whose ticks keep the fonts that are set when they are made.
    short = [
        literal(n if len(n) <= _LONGEST else f"{n[: _LONGEST - 1]}…")
        for n in names[: MOST_NAMES * named]
    ]
    size = 4 + 0.3 * classes if named else 13.0  # inches; a pixel or more for each of 1,000
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    # Off the diagonal of many classes shares are small and cells tiny: the root lifts them.
    scale = PowerNorm(1.0 if named else 0.5, vmin=0, vmax=100)
    drawn = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.set_label("% of the label's images")
    axes.set(xlabel="prediction", ylabel="label")
    if named:
        axes.set_xticks(range(classes), short, rotation=90)
        axes.set_yticks(range(classes), short)
    if classes <= _MOST_NUMBERS:
        for row, column in zip(*np.nonzero(matrix)):
            colour = "white" if shares[row, column] > 50 else "black"
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axes.text(column, row, str(matrix[row, column]), **style)
    save_figure(figure, path, dpi=110)
