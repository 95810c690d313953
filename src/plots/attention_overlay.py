"""Draw attention maps over an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure

from src.plots.image_files import escape_text, save_figure

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
COLOURMAP = "inferno"
_WIDTH = 10.0  # inches
_COLUMNS = 3  # of the upper row
_MAX_COLUMNS = 8  # of the heads


class Panel(NamedTuple):
    """A map over the image.

    Args:
        title: of the panel.
        values: [H, W], the attention to each pixel as a multiple of uniform attention.
        on_itself: the fraction of the class token's attention to itself, 0..1.
    """

    title: str
    values: np.ndarray
    on_itself: float


def draw_attention(
    image: np.ndarray, title: str, mean: Panel, rollout: Panel, heads: Sequence[Panel], path: Path
) -> None:
    """Draw the image, the mean over heads and the rollout, and below them every head.

    Args:
        image: the network's input as pixels, uint8 [H, W, 3].
        title: of the picture.
        mean, rollout, heads: the maps, each with its own colour scale.
        path: the file; its suffix determines the format.

    Raises:
        UserError: it can't be written.
    """
    if len(heads) == 1:
        heads = []  # it is the mean
    rows = math.ceil(len(heads) / _MAX_COLUMNS)
    columns = max(_COLUMNS, math.ceil(len(heads) / max(rows, 1)))
    aspect = image.shape[0] / image.shape[1]
    heights = [aspect * _WIDTH / _COLUMNS + 0.5, rows * (aspect * _WIDTH / columns + 0.45)]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.85), layout="constrained")
    figure.suptitle(escape_text(title), fontsize=14, fontweight="bold")
    upper, *lower = figure.subfigures(
        2 if rows else 1, 1, height_ratios=heights[: 1 + bool(rows)], squeeze=False
    ).flat
    first, *others = upper.subplots(1, _COLUMNS)
    first.imshow(image)
    _add_frame(first, "what the network saw", f"{image.shape[1]} × {image.shape[0]} px", 11)
    for axes, panel in zip(others, (mean, rollout)):
        _draw_overlay(axes, image, panel, 11)
    if not rows:
        _add_legend(upper, [first, *others])
    else:
        _draw_heads(lower[0], image, heads, rows, columns)
    save_figure(figure, path, dpi=130)


def _draw_heads(
    figure: SubFigure, image: np.ndarray, heads: Sequence[Panel], rows: int, columns: int
) -> None:
    grid = np.ravel(figure.subplots(rows, columns))
    for axes, panel in zip(grid, heads):
        _draw_overlay(axes, image, panel, 10 if columns <= 4 else 8)
    for axes in grid[len(heads) :]:
        axes.set_visible(False)
    _add_legend(figure, list(grid))


def _draw_overlay(axes: Axes, image: np.ndarray, panel: Panel, size: float) -> None:
    """Draw a map in colours over the grey image; higher values are more opaque."""
    peak = panel.values.max()
    level = panel.values / max(peak, 2.0)  # a nearly uniform map stays dim
    grey = image @ np.array([0.299, 0.587, 0.114]) / 255
    colours = matplotlib.colormaps[COLOURMAP](level)[..., :3]
    opacity = (0.35 + 0.4 * level)[..., None]
    axes.imshow((1 - opacity) * grey[..., None] + opacity * colours)
    note = f"peak {peak:.1f} x uniform, {100 * panel.on_itself:.0f} % on the class token"
    _add_frame(axes, panel.title, note, size)


def _add_frame(axes: Axes, title: str, note: str, size: float) -> None:
    axes.set_title(title, fontsize=size)
    axes.set_xlabel(note, fontsize=size - 2, color="0.35")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _add_legend(figure: SubFigure, axes: list[Axes]) -> None:
    colours = ScalarMappable(cmap=COLOURMAP)
    bar = figure.colorbar(colours, ax=axes, location="bottom", aspect=60, shrink=0.6, pad=0.02)
    bar.set_ticks([0, 1], labels=["none", "the panel's peak, or 2 x uniform"])
    bar.set_label("attention of the class token, last stage", fontsize=9)
    bar.ax.tick_params(labelsize=9, length=0)
    bar.outline.set_visible(False)
