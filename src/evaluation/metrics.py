"""Compute accuracy and loss as sums over images, exact for any batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from src.errors import UserError


class Outcomes(NamedTuple):
    """Per-image results; arrays [N], float64 because ranks gather them as one array.

    Args:
        prediction: the top-1 class.
        confidence: its probability.
        correct1: 1 if the top-1 class is correct, else 0.
        correct5: 1 if any of the top-5 classes is correct, else 0.
        loss: -log of the summed probability of the correct class or classes.
    """

    prediction: np.ndarray
    confidence: np.ndarray
    correct1: np.ndarray
    correct5: np.ndarray
    loss: np.ndarray


def score_batch(logits: np.ndarray, labels: np.ndarray | Sequence[Sequence[int]]) -> Outcomes:
    """Compare a batch of logits with its labels.

    Args:
        logits: float [N, C].
        labels: int [N], or a list of correct classes per image (ReaL).

    Raises:
        UserError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's output is not finite: the weights are damaged or diverged; "
            "use other weights, or train with a lower optimizer.lr"
        )
    logits = logits.astype(np.float64)
    rows = np.arange(len(logits))
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    peak = logits.max(axis=1, keepdims=True)
    log_sum = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
    if isinstance(labels, np.ndarray):
        hits = ranked == labels[:, None]  # [N, 5]
        target = logits[rows, labels]
    else:
        hits = np.array([np.isin(top5, classes) for top5, classes in zip(ranked, labels)])
        target = np.array(
            [np.logaddexp.reduce(row[sorted({*classes})]) for row, classes in zip(logits, labels)]
        )
    return Outcomes(
        ranked[:, 0].astype(np.float64),
        np.exp(peak[:, 0] - log_sum),
        hits[:, 0].astype(np.float64),
        hits.any(axis=1).astype(np.float64),
        log_sum - target,
    )


@dataclass
class Metrics:
    """Sums over the images seen so far."""

    images: int = 0
    correct1: int = 0
    correct5: int = 0
    loss_sum: float = 0.0

    def update(self, logits: np.ndarray, labels: np.ndarray | Sequence[Sequence[int]]) -> Outcomes:
        """Add a batch and return the outcomes of its images; see `score_batch`."""
        outcomes = score_batch(logits, labels)
        self.images += len(labels)
        self.correct1 += int(outcomes.correct1.sum())
        self.correct5 += int(outcomes.correct5.sum())
        self.loss_sum += float(outcomes.loss.sum())
        return outcomes

    @property
    def sums(self) -> np.ndarray:
        """The sums as float64 [4], as `from_sums` expects them."""
        return np.array([self.images, self.correct1, self.correct5, self.loss_sum])

    @classmethod
    def from_sums(cls, sums: np.ndarray) -> Metrics:
        """Add up the sums of several ranks, float64 [ranks, 4]."""
        images, correct1, correct5, loss_sum = sums.sum(axis=0)
        return cls(int(images), int(correct1), int(correct5), float(loss_sum))

    @property
    def top1(self) -> float:
        """Top-1 accuracy in per cent."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Top-5 accuracy in per cent."""
        return 100 * self.correct5 / self.images

    @property
    def loss(self) -> float:
        """Mean cross entropy, without label smoothing."""
        return self.loss_sum / self.images
