"""Plots of a study, also of one that has only begun."""

import numpy as np
import pytest
from PIL import Image

from tools.study.plots import plot_by_cost, plot_by_images, plot_curves

NAN = float("nan")


def drawn(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has_colour(picture, rgb):
    return (np.abs(picture - rgb).sum(axis=-1) < 12).sum() > 50


BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # of the first three models


@pytest.mark.parametrize(
    "accuracy, both",
    [
        ({"a": {250: (60.0, 1.0), 4000: (70.0, 2.0)}, "b": {250: (50.0, NAN)}}, True),
        ({"a": {250: (60.0, NAN)}, "b": {}}, False),
    ],
)
def test_against_images(tmp_path, accuracy, both):
    plot_by_images(accuracy, tmp_path / "a.png")
    picture = drawn(tmp_path / "a.png")
    assert has_colour(picture, BLUE) and has_colour(picture, ORANGE) == both


def test_the_course_of_training(tmp_path):
    passes = np.array([1.0, 2.0])
    curves = {
        250: {"a": (passes, np.array([[10.0, 20.0], [12.0, 25.0]]))},
        1000: {"b": (passes / 4, np.array([[10.0, 20.0]]))},
    }
    curves = {250: {**curves[250], "b": curves[1000]["b"]}, **curves}
    plot_curves(curves, ["a", "b"], "passes", tmp_path / "a.png")
    assert has_colour(drawn(tmp_path / "a.png"), BLUE)


def test_a_model_has_its_colour_and_legend_where_others_are_missing(tmp_path):
    """The first panel lacks a, the second one b and c; all are in the legend."""
    line = np.array([1.0, 2.0]), np.array([[10.0, 20.0]])
    curves = {250: {"b": line, "c": line}, 1000: {"a": line}}
    plot_curves(curves, ["a", "b", "c"], "passes", tmp_path / "a.png")
    left, right = np.array_split(drawn(tmp_path / "a.png"), 2, axis=1)
    assert has_colour(right, BLUE) and not has_colour(right, ORANGE)
    assert has_colour(left, GREEN)
    assert (np.abs(left - BLUE).sum(axis=-1) < 12).any(), "in the legend"
    plot_by_cost({"b": (1, 1, (60.0, NAN))}, ["a", "b"], 250, tmp_path / "b.png")
    picture = drawn(tmp_path / "b.png")
    assert has_colour(picture, ORANGE) and not has_colour(picture, BLUE)


def test_against_cost(tmp_path):
    points = {"a": (400_000, 11_500_000, (60.0, 1.0)), "b": (410_000, 30_100_000, (50.0, NAN))}
    plot_by_cost(points, ["a", "b"], 250, tmp_path / "a.png")
    picture = drawn(tmp_path / "a.png")
    assert has_colour(picture, BLUE) and has_colour(picture, ORANGE)


def test_networks_of_equal_cost_stand_above_each_other(tmp_path):
    points = {
        "a": (415_498, 11_497_000, (60.0, NAN)),
        "b": (420_325, 11_436_000, (50.0, NAN)),
    }
    plot_by_cost(points, ["a", "b"], 250, tmp_path / "a.png")
    right = drawn(tmp_path / "a.png")[:, 450:]
    columns = [
        np.nonzero((np.abs(right - rgb).sum(axis=-1) < 12).any(axis=0))[0].mean()
        for rgb in (BLUE, ORANGE)
    ]
    assert abs(columns[0] - columns[1]) < 10
