"""What a person asks behind the accuracy: which classes, which images, and how sure it was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.evaluation.evaluator import Result
from src.evaluation.labels import Labelled
from src.evaluation.metrics import Outcomes
from src.files import is_csv, is_json, require_replaceable, write_csv, write_json

PICTURE, FIGURES = "confusion_matrix.png", "figures.json"
# The tables of a report, and their first columns.
TABLES = {
    "calibration.csv": ("above", "up_to", "images", "accuracy", "confidence"),
    "per_class.csv": ("class", "images", "correct", "accuracy_percent"),
    "confusion_matrix.csv": ("label \\ prediction",),
    "worst_images.csv": (
        "image", "label", "prediction", "probability_of_label", "probability_of_prediction",
    ),
}  # fmt: skip
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


def require_report(path: str, force: bool) -> Path:
    """Check that a report can be written to a folder, before the evaluation.

    Args:
        path: the folder; it may be missing.
        force: replace files that are no earlier report's.

    Raises:
        UserError: it can't be written to, or a file in it would be lost.
    """
    from src.plots.image_files import is_picture_of_ours

    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--report {path}: is no folder; give another one")
    for name, head in TABLES.items():
        require_replaceable(folder / name, "--report", partial(is_csv, head=head), force)
    require_replaceable(folder / PICTURE, "--report", is_picture_of_ours, force)
    require_replaceable(folder / FIGURES, "--report", is_result, force)
    return folder


def is_result(path: Path) -> bool:
    """Whether a JSON file is an earlier result of eval.py."""
    return is_json(path, lambda content: set(Result.FIGURES) <= content.keys())


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
    from src.plots.confusion_matrix import draw_confusion  # matplotlib takes 0.5 s

    source, outcomes = images.source, result.outcomes
    names = source.class_names
    calibration = calibrate(outcomes)
    figures = {**result.to_dict(), "ece": calibration.ece}
    matrix = confusion_matrix(source.labels, outcomes.prediction, len(names))
    edges = np.linspace(0, 1, BINS + 1)
    write_csv(
        TABLES["calibration.csv"],
        [
            [f"{low:.4f}", f"{high:.4f}", count, f"{accuracy:.6f}", f"{confidence:.6f}"]
            for low, high, count, accuracy, confidence in zip(edges, edges[1:], *calibration)
        ],
        folder / "calibration.csv",
    )
    write_csv(
        TABLES["per_class.csv"],
        _per_class(source.labels, outcomes.correct1, names),
        folder / "per_class.csv",
    )
    write_csv(
        [*TABLES["confusion_matrix.csv"], *names],
        ([name, *row] for name, row in zip(names, matrix.tolist())),
        folder / "confusion_matrix.csv",
    )
    draw_confusion(matrix, names, folder / PICTURE)
    write_csv(
        TABLES["worst_images.csv"],
        _worst(images, outcomes),
        folder / "worst_images.csv",
    )
    write_json(figures, folder / FIGURES)
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
