"""Write a report: accuracy per class, confusion matrix, calibration and the worst images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.errors import UserError
from src.evaluation.evaluator import Result
from src.evaluation.labels import LabeledSplit
from src.evaluation.metrics import Outcomes
from src.files import is_csv, is_json, require_replaceable, write_csv, write_json

PLOT_FILE, METRICS_FILE = "confusion_matrix.png", "figures.json"
# The first columns of each table.
TABLES = {
    "calibration.csv": ("above", "up_to", "images", "accuracy", "confidence"),
    "per_class.csv": ("class", "images", "correct", "accuracy_percent"),
    "confusion_matrix.csv": ("label \\ prediction",),
    "worst_images.csv": (
        "image", "label", "prediction", "probability_of_label", "probability_of_prediction",
    ),
}  # fmt: skip
BINS = 15  # as Guo et al. use
WORST = 50  # rows of worst_images.csv
MAX_CLASSES = 5000  # of a confusion matrix

logger = logging.getLogger("cvt")


class Calibration(NamedTuple):
    """Accuracy and confidence by confidence bin; arrays [bins].

    Args:
        images: the number of images in the bin.
        accuracy, confidence: means over the bin, 0..1; 0 for an empty bin.
    """

    images: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error in per cent: the bins' mean gap, weighted by images."""
        gaps = np.abs(self.accuracy - self.confidence)
        return 100 * float((self.images * gaps).sum() / self.images.sum())


def calibrate(outcomes: Outcomes, bins: int = BINS) -> Calibration:
    """Bin images by confidence, in bins of equal width (Guo et al., 2017, arXiv 1706.04599).

    Bin m holds confidences in (m / bins, (m + 1) / bins], as in section 2 of the paper.
    """
    bin_of = np.clip(np.ceil(outcomes.confidence * bins) - 1, 0, bins - 1).astype(int)
    images = np.bincount(bin_of, minlength=bins)
    means = (
        np.bincount(bin_of, values, bins) / np.maximum(images, 1)
        for values in (outcomes.correct1, outcomes.confidence)
    )
    return Calibration(images, *means)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Count images by label (rows) and prediction (columns), int [classes, classes]."""
    cells = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def check_report(path: str, force: bool) -> Path:
    """Check before the evaluation that a report can be written to a folder.

    Args:
        path: the folder; it need not exist.
        force: replace files that are not from an earlier report.

    Raises:
        UserError: the folder is not writable, or holds other files of the same names.
    """
    from src.plots.image_files import check_picture

    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--report {path}: not a folder; give another one")
    for name, head in TABLES.items():
        require_replaceable(folder / name, "--report", partial(is_csv, head=head), force)
    check_picture(folder / PLOT_FILE, "--report", [".png"], force)
    require_replaceable(folder / METRICS_FILE, "--report", is_result, force)
    return folder


def is_result(path: Path) -> bool:
    """Return whether a file is an earlier JSON result of eval.py."""
    return is_json(path, lambda content: set(Result.METRICS) <= content.keys())


def write_report(
    metrics: dict[str, float], outcomes: Outcomes, images: LabeledSplit, folder: Path
) -> None:
    """Write the metrics, tables and plot of an evaluation.

    Args:
        metrics: for figures.json.
        outcomes: of each image.
        images: the evaluated split.
        folder: receives per_class.csv, confusion_matrix.csv, confusion_matrix.png,
            calibration.csv, worst_images.csv and figures.json. Above 5,000 classes the confusion
            matrix is left out, with a log line: it has their square.

    Raises:
        UserError: a file cannot be written.
    """
    from src.plots.confusion_matrix import draw_confusion  # matplotlib takes 0.5 s

    write_json(metrics, folder / METRICS_FILE)
    source = images.source
    names = source.class_names
    calibration = calibrate(outcomes)
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
    write_csv(TABLES["worst_images.csv"], _worst(images, outcomes), folder / "worst_images.csv")
    if len(names) > MAX_CLASSES:
        logger.warning("no confusion matrix: %d classes, more than %d", len(names), MAX_CLASSES)
        return
    matrix = confusion_matrix(source.labels, outcomes.prediction, len(names))
    write_csv(
        [*TABLES["confusion_matrix.csv"], *names],
        ([name, *row] for name, row in zip(names, matrix.tolist())),
        folder / "confusion_matrix.csv",
    )
    draw_confusion(matrix, names, folder / PLOT_FILE)


def _per_class(labels: np.ndarray, correct: np.ndarray, names: Sequence[str]) -> list[list]:
    """Return rows of class, images, correct, per cent (empty for a class without images)."""
    images = np.bincount(labels, minlength=len(names)).tolist()
    hits = np.bincount(labels, correct, len(names)).astype(int).tolist()
    return [
        [name, count, right, f"{100 * right / count:.2f}" if count else ""]
        for name, count, right in zip(names, images, hits)
    ]


def _worst(images: LabeledSplit, outcomes: Outcomes) -> list[list]:
    """Return rows of the images with the highest loss; ReaL's correct classes as "a | b"."""
    source, rows = images.source, []
    for k in np.argsort(-outcomes.loss, kind="stable")[:WORST].tolist():
        labels = [source.labels[k]] if images.label_lists is None else images.label_lists[k]
        rows.append(
            [
                source.describe(k),
                " | ".join(source.class_names[label] for label in labels),
                source.class_names[int(outcomes.prediction[k])],
                f"{np.exp(-outcomes.loss[k]):.3e}",
                f"{outcomes.confidence[k]:.4f}",
            ]
        )
    return rows
