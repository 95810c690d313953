"""What a person asks behind the accuracy: which classes, which images, and how sure it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.evaluation.evaluator import Result
from src.evaluation.labels import Labelled
from src.evaluation.metrics import Outcomes
from src.files import write_csv, write_json
from src.reporting.confusion import draw_confusion

BINS = 15  # of the confidence, as in Guo et al.
WORST = 50


class Calibration(NamedTuple):
    """Confidence against accuracy, by bins of the confidence: arrays [bins].

    Args:
        images: in the bin.
        accuracy, confidence: means in the bin, 0..1; 0 where it is empty.
    """

    images: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error in per cent: the mean gap of the bins, weighed by images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return 100 * float((self.images * gaps).sum() / self.images.sum())


def calibrate(outcomes: Outcomes, bins: int = BINS) -> Calibration:
    """Sort images into bins of equal width by confidence (Guo et al., 2017, arXiv 1706.04599).

    Bin m holds confidences in (m / bins, (m + 1) / bins], as in section 2 there.
    """
    bin_of = np.clip(np.ceil(outcomes.confidence * bins) - 1, 0, bins - 1).astype(int)
    images = np.bincount(bin_of, minlength=bins)
    means = (
        np.bincount(bin_of, values, bins) / np.maximum(images, 1)
        for values in (outcomes.correct1, outcomes.confidence)
    )
    return Calibration(images, *means)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Images by label (rows) and prediction (columns), int [classes, classes]."""
    cells = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def open_folder(path: str) -> Path:
    """The report's folder, made before the evaluation, so that it isn't in vain.

    Raises:
        UserError: it can't be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--report {path}: {error.strerror}; give another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--report {path}: can't be written to; give another folder")
    return folder


def write_report(result: Result, images: Labelled, folder: Path) -> dict[str, float]:
    """Write what the result tells of classes, images and confidence.

    Args:
        result: with outcomes.
        images: that it is of.
        folder: gets per_class.csv, confusion_matrix.csv, confusion_matrix.png, calibration.csv,
            worst_images.csv and figures.json.

    Returns:
        The result's figures and "ece".

    Raises:
        UserError: a file can't be written.
    """
    source, outcomes = images.source, result.outcomes
    names = source.class_names
    calibration = calibrate(outcomes)
    figures = {**result.to_dict(), "ece": calibration.ece}
    matrix = confusion_matrix(source.labels, outcomes.prediction, len(names))
    edges = np.linspace(0, 1, BINS + 1)
    write_csv(
        ["above", "up_to", "images", "accuracy", "confidence"],
        [
            [f"{low:.4f}", f"{high:.4f}", count, f"{accuracy:.6f}", f"{confidence:.6f}"]
            for low, high, count, accuracy, confidence in zip(edges, edges[1:], *calibration)
        ],
        folder / "calibration.csv",
    )
    write_csv(
        ["class", "images", "correct", "accuracy_percent"],
        _per_class(source.labels, outcomes.correct1, names),
        folder / "per_class.csv",
    )
    write_csv(
        ["label \\ prediction", *names],
        ([name, *row] for name, row in zip(names, matrix.tolist())),
        folder / "confusion_matrix.csv",
    )
    draw_confusion(matrix, names, folder / "confusion_matrix.png")
    write_csv(
        ["image", "label", "prediction", "probability_of_label", "probability_of_prediction"],
        _worst(images, outcomes),
        folder / "worst_images.csv",
    )
    write_json(figures, folder / "figures.json")
    return figures


def _per_class(labels: np.ndarray, correct: np.ndarray, names: Sequence[str]) -> list[list]:
    """Rows of name, images, correct ones, per cent; no per cent where there is no image."""
    images = np.bincount(labels, minlength=len(names)).tolist()
    right = np.bincount(labels, correct, len(names)).astype(int).tolist()
    return [
        [name, count, hits, f"{100 * hits / count:.2f}" if count else ""]
        for name, count, hits in zip(names, images, right)
    ]


def _worst(images: Labelled, outcomes: Outcomes) -> list[list]:
    """Rows of the images with the highest loss; several right classes stand as "a | b"."""
    source, rows = images.source, []
    for k in np.argsort(-outcomes.loss, kind="stable")[:WORST].tolist():
        right = [source.labels[k]] if images.label_lists is None else images.label_lists[k]
        rows.append(
            [
                source.describe(k),
                " | ".join(source.class_names[label] for label in right),
                source.class_names[int(outcomes.prediction[k])],
                f"{np.exp(-outcomes.loss[k]):.3e}",
                f"{outcomes.confidence[k]:.4f}",
            ]
        )
    return rows
