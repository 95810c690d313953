"""Draw a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from src.plots.image_files import escape_text, save_figure

MAX_NAMED = 50  # classes; more names would be illegible
_MAX_NUMBERED = 20  # classes; more numbers would be illegible
_MAX_LETTERS = 20  # of a name


def draw_confusion(matrix: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw each class's predictions in per cent of its images.

    Args:
        matrix: images by label (rows) and prediction (columns), int [C, C].
        names: class names; more than `MAX_NAMED` are not drawn.
        path: the file.

    Raises:
        UserError: the file can't be written.
    """
    classes = len(matrix)
    percent = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = classes <= MAX_NAMED
    # Before any axes: ticks keep the fonts that are set when they are created.
    short = [
        escape_text(n if len(n) <= _MAX_LETTERS else f"{n[: _MAX_LETTERS - 1]}…")
        for n in names[: MAX_NAMED * named]
    ]
    size = 4 + 0.3 * classes if named else 13.0  # inches; at least one pixel per class for 1,000
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    # With many classes, values off the diagonal are small and cells tiny: a square root lifts them.
    scale = PowerNorm(1.0 if named else 0.5, vmin=0, vmax=100)
    drawn = axes.imshow(percent, cmap="Blues", norm=scale, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.set_label("% of the label's images")
    axes.set(xlabel="prediction", ylabel="label")
    if named:
        axes.set_xticks(range(classes), short, rotation=90)
        axes.set_yticks(range(classes), short)
    if classes <= _MAX_NUMBERED:
        for row, column in zip(*np.nonzero(matrix)):
            colour = "white" if percent[row, column] > 50 else "black"
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axes.text(column, row, str(matrix[row, column]), **style)
    save_figure(figure, path, dpi=110)
