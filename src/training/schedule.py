"""Computes the learning rate of every step."""

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
    decay_epochs: int | None = None,
) -> np.ndarray:
    """Compute the learning rates: linear warm-up, then a cosine down to `minimum`.

    As in timm's `CosineLRScheduler`, which the official code uses, the cosine spans all epochs and
    the warm-up replaces its first part. With per="epoch" the rate is constant within an epoch, with
    per="step" it changes at each step.

    With `decay_epochs`, the rate stays at `peak` until that many epochs are left, and the cosine
    runs over these (warmup-stable-decay, Hu et al., 2024, arXiv 2404.06395).

    Returns:
        float32 [epochs * steps_per_epoch].
    """
    steps = np.arange(epochs * steps_per_epoch)
    epoch = steps // steps_per_epoch if per == "epoch" else steps / steps_per_epoch
    decay = epochs if decay_epochs is None else min(decay_epochs, epochs)
    progress = np.clip(1 - (epochs - epoch) / decay, 0, 1) if decay else 0.0  # of the cosine
    cosine = minimum + (peak - minimum) * (1 + np.cos(np.pi * progress)) / 2
    warmup = warmup_start + (peak - warmup_start) * epoch / max(warmup_epochs, 1)
    return np.where(epoch < warmup_epochs, warmup, cosine).astype(np.float32)
