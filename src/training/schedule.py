"""Learning rates as pure functions of a recipe."""

from __future__ import annotations

import numpy as np


def learning_rates(
    *,
    peak: float,
    warmup_start: float,
    minimum: float,
    epochs: int,
    warmup_epochs: int,
    steps_per_epoch: int,
    per: str = "epoch",
) -> np.ndarray:
    """The learning rate of every step: linear warm-up, then a cosine down to `minimum`.

    The cosine runs over all epochs and the warm-up replaces its first part, as timm's
    `CosineLRScheduler` that the official code uses; per "epoch" the rate of epoch e holds for all
    of its steps, per "step" it changes with each step.

    Returns:
        float32 [epochs * steps_per_epoch].
    """
    steps = np.arange(epochs * steps_per_epoch)
    epoch = steps // steps_per_epoch if per == "epoch" else steps / steps_per_epoch
    cosine = minimum + (peak - minimum) * (1 + np.cos(np.pi * epoch / epochs)) / 2
    warmup = warmup_start + (peak - warmup_start) * epoch / max(warmup_epochs, 1)
    return np.where(epoch < warmup_epochs, warmup, cosine).astype(np.float32)
