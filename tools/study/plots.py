"""Plots of a study: accuracy against training images, training progress and model cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from src.plots.image_files import save_figure

MARKERS = "osD^vPX*<>hd"
ACCURACY = "held-out top-1, %"
Point = tuple[float, float]  # mean and standard deviation, NaN where there is only one value


def _style(number: int) -> dict:
    """Return a model's colour and marker, the same in every plot."""
    return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "capsize": 3}


def _errors(deviations: Sequence[float]) -> np.ndarray:
    return np.nan_to_num(np.asarray(deviations, float))


def plot_by_images(accuracy: dict[str, dict[int, Point]], path: Path) -> None:
    """Plot accuracy against training images; bars are standard deviations.

    Args:
        accuracy: mean and deviation by model and number of training images.
        path: the image file.
    """
    figure, axes = _figure(1)
    for number, (model, points) in enumerate(accuracy.items()):
        if points:
            sizes = sorted(points)
            means, deviations = zip(*(points[size] for size in sizes))
            axes[0].errorbar(sizes, means, _errors(deviations), label=model, **_style(number))
    axes[0].set(xlabel="training images", ylabel=ACCURACY)
    _logarithmic(axes[0], sorted({size for points in accuracy.values() for size in points}))
    _save(figure, path)


Curves = dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]


def plot_curves(curves: Curves, models: Sequence[str], xlabel: str, path: Path) -> None:
    """Plot accuracy in the course of training, one panel per number of training images.

    Args:
        curves: by training images and model: positions of the evaluations [N] and accuracies [S, N]
            of S seeds. A band is one standard deviation to either side.
        models: all of the study, in its order, which decides on the colours.
        xlabel: label of the positions.
        path: the image file.
    """
    figure, panels = _figure(len(curves))
    for axes, (size, by_model) in zip(panels, curves.items()):
        for model, (positions, values) in by_model.items():
            mean, color = values.mean(axis=0), _style(models.index(model))["color"]
            axes.plot(positions, mean, label=model, color=color)
            if len(values) > 1:
                band = values.std(axis=0, ddof=1)
                axes.fill_between(positions, mean - band, mean + band, color=color, alpha=0.15)
        axes.set(title=f"{size:,} training images", xlabel=xlabel)
    panels[0].set(ylabel=ACCURACY)
    _save(figure, path)


def plot_by_cost(
    points: dict[str, tuple[int, int, Point]], models: Sequence[str], size: int, path: Path
) -> None:
    """Plot accuracy against parameters and against multiply-accumulates.

    Args:
        points: parameters, MACs for one image, and accuracy by model.
        models: as for `plot_curves`.
        size: number of training images of these accuracies.
        path: the image file.
    """
    figure, panels = _figure(2)
    for model, (*costs, (mean, deviation)) in points.items():
        style = _style(models.index(model))
        for axes, cost, unit in zip(panels, costs, (1e3, 1e6)):
            errors = _errors([deviation])
            axes.errorbar([cost / unit], [mean], errors, ls="", label=model, **style)
    for axes, name in zip(
        panels, ("thousand parameters", "million multiply-accumulates per image")
    ):
        axes.set(xlabel=name, ylabel=ACCURACY, title=f"{size:,} training images")
        axes.set_xlim(0, 1.15 * axes.dataLim.x1)  # or equal costs would look different
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    _save(figure, path)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    width = 6 if panels == 1 else 4.5 * panels
    figure = Figure(figsize=(width, 4), layout="constrained")  # no pyplot: no display is needed
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _logarithmic(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    drawn = [axes.get_legend_handles_labels() for axes in figure.axes]
    by_name = {name: handle for each in drawn for handle, name in zip(*each)}
    figure.axes[0].legend(by_name.values(), by_name.keys())
    save_figure(figure, path, dpi=100)
