"""Rows, means and spreads."""

import numpy as np
import pytest

from tools.study.networks import Network
from tools.study.results import COLUMNS, Result, Spread, markdown

NETWORKS = {"conv": Network(1_234_567, 12_340_000, 1000), "linear": Network(89, 1_000_000, 1000)}
TOP1 = {"conv-40-0": 61.25, "linear-40-0": 50.5, "conv-40-1": 63.0, "linear-40-1": 55.0}


def finished(cell, top1, best):
    rows = [
        {"step": 3, "train_loss": 2.0, "loss": 2.1, "top1": best, "top5": 90.0, "seconds": 4.0},
        {"step": 6, "train_loss": 1.0, "loss": 1.1, "top1": top1, "top5": 91.0, "seconds": 2.5},
    ]
    return Result(cell, NETWORKS[cell.model], rows)


@pytest.fixture
def results(cells):
    return [finished(cell, TOP1[cell.name], 99.0) for cell in cells]


def test_a_row_tells_the_final_accuracy_and_the_best_one_apart(results):
    row = results[2].row()
    assert set(row) == set(COLUMNS)
    assert row == {
        "model": "conv", "train_images": 40, "seed": 1, "steps": 6, "epochs": 6 * 64 / 40,
        "top1": 63.0, "top5": 91.0, "loss": 1.1, "best_top1": 99.0, "train_loss": 1.0,
        "seconds": 6.5, "parameters": 1_234_567, "macs": 12_340_000,
    }  # fmt: skip


def test_the_course_of_training_in_passes_operations_and_seconds(results):
    """3 and 6 steps of 64 images; a step has three forward passes of 12.34 MMACs an image."""
    np.testing.assert_allclose(results[0].passes, [4.8, 9.6])
    np.testing.assert_allclose(results[0].training_macs, [192 * 37_020_000, 384 * 37_020_000])
    np.testing.assert_allclose(results[0].seconds, [4.0, 6.5])


def test_mean_and_sample_deviation_of_the_final_accuracy(cells, results):
    lines = markdown(cells, results).splitlines()
    for model in ("conv", "linear"):
        values = [TOP1[f"{model}-40-{seed}"] for seed in (0, 1)]
        expected = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (2)"
        line = next(line for line in lines if line.startswith(f"| `{model}` |"))
        assert line.split(" | ")[-1] == f"{expected} |"
    assert "| `conv` | 1,234,567 | 12.3 | 62.12 ± 1.24 (2) |" in lines
    ahead = [50.5 - 61.25, 55.0 - 63.0]
    assert lines[-1] == f"| `linear` | {np.mean(ahead):+.2f} ± {np.std(ahead, ddof=1):.2f} (2) |"
    assert "on 1,000 held-out images, of the weights after the last of 6 steps of 64" in lines[0]


def test_what_is_not_finished_is_not_in_the_table(cells, results):
    text = markdown(cells, [results[0], results[3]])
    assert "| 61.25 (1) |" in text and "| 55.00 (1) |" in text
    assert text.splitlines()[-1] == "| `linear` | – |", "no seed is common to both"
    assert "2 of 4 runs are finished" in text
    assert "MindSpore" not in text, "cells may be of other machines and versions"
    assert "| `linear` | – | – | – |" in markdown(cells, results[:1])


def test_a_moving_average_is_named(cells, results):
    for cell in cells:
        cell.config.training.ema_decay = 0.9
    assert "of the weights' moving average after" in markdown(cells, results)


def test_one_value_has_no_deviation():
    assert np.isnan(Spread.of([3.0]).deviation)
    assert Spread.of([3.0]).text() == "3.00 (1)"
