"""Accuracy and loss as sums over images, so that batches of any size add up exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from src.errors import UserError


class Outcomes(NamedTuple):
    """What became of each image; arrays [N] of float64, so that ranks can gather them.

    Args:
        prediction: the best class.
        confidence: its probability.
        correct1: 1 where it is right, else 0.
        correct5: 1 where one of the five best classes is right.
        loss: -log of the right class's probability; of the right ones' sum, if there are several.
    """

    prediction: np.ndarray
    confidence: np.ndarray
    correct1: np.ndarray
    correct5: np.ndarray
    loss: np.ndarray


def judge(logits: np.ndarray, labels: np.ndarray | Sequence[Sequence[int]]) -> Outcomes:
    """Compare a batch with its labels.

    Args:
        logits: float [N, C].
        labels: int [N], or a list of right classes for each image, as ReaL has them.

    Raises:
        UserError: a logit is not finite, so no accuracy of it means anything.
    """
    if not np.isfinite(logits).all():
        raise UserError("the network's output is not finite: the weights are damaged or diverged")
    logits = logits.astype(np.float64)
    rows = np.arange(len(logits))
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    peak = logits.max(axis=1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
    if isinstance(labels, np.ndarray):
        hits = ranked == labels[:, None]  # [N, 5]
        right = logits[rows, labels]
    else:
        hits = np.array([np.isin(best, right) for best, right in zip(ranked, labels)])
        right = np.array([np.logaddexp.reduce(row[sorted({*k})]) for row, k in zip(logits, labels)])
    return Outcomes(
        ranked[:, 0].astype(np.float64),
        np.exp(peak[:, 0] - log_sum),
        hits[:, 0].astype(np.float64),
        hits.any(axis=1).astype(np.float64),
        log_sum - right,
    )


@dataclass
class Metrics:
    """Sums over the images seen so far."""

    images: int = 0
    correct1: int = 0
    correct5: int = 0
    loss_sum: float = 0.0

    def update(self, logits: np.ndarray, labels: np.ndarray | Sequence[Sequence[int]]) -> Outcomes:
        """Add a batch, as `judge` takes it, and return what became of its images."""
        outcomes = judge(logits, labels)
        self.images += len(labels)
        self.correct1 += int(outcomes.correct1.sum())
        self.correct5 += int(outcomes.correct5.sum())
        self.loss_sum += float(outcomes.loss.sum())
        return outcomes

    @property
    def sums(self) -> np.ndarray:
        """The sums as float64 [4], for `of`."""
        return np.array([self.images, self.correct1, self.correct5, self.loss_sum])

    @classmethod
    def of(cls, sums: np.ndarray) -> Metrics:
        """From the sums of several parts, float64 [parts, 4]."""
        images, correct1, correct5, loss_sum = sums.sum(axis=0)
        return cls(int(images), int(correct1), int(correct5), float(loss_sum))

    @property
    def top1(self) -> float:
        """Per cent of the images whose best class is right."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Per cent of the images with a right class among the five best."""
        return 100 * self.correct5 / self.images

    @property
    def loss(self) -> float:
        """Mean cross entropy, without label smoothing."""
        return self.loss_sum / self.images
