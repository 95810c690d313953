"""Accuracy and loss as sums over images, so that batches of any size add up exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.errors import UserError


@dataclass
class Metrics:
    """Sums over the images seen so far."""

    images: int = 0
    correct1: int = 0
    correct5: int = 0
    loss_sum: float = 0.0

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch: logits float [N, C], labels int [N].

        Raises:
            UserError: a logit is not finite, so no accuracy of it means anything.
        """
        if not np.isfinite(logits).all():
            raise UserError(
                "the network's output is not finite: the weights are damaged or diverged"
            )
        logits = logits.astype(np.float64)
        ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        hits = ranked == labels[:, None]
        peak = logits.max(axis=1, keepdims=True)
        log_sum = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
        self.images += len(labels)
        self.correct1 += int(hits[:, 0].sum())
        self.correct5 += int(hits.sum())
        self.loss_sum += float((log_sum - logits[np.arange(len(labels)), labels]).sum())

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
        """Per cent of the images with the right class among the five best."""
        return 100 * self.correct5 / self.images

    @property
    def loss(self) -> float:
        """Mean cross entropy, without label smoothing."""
        return self.loss_sum / self.images
