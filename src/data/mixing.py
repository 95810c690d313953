"""Draw the parameters of mixup and cutmix for each batch.

`src.training.train_step.mix_images` blends the images with them, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of each batch with its reverse.

    Source: timm's `Mixup` in its "batch" mode, which the official CvT recipe uses.

    Args:
        mixup: alpha of the Beta distribution of mixup's fraction; 0 turns mixup off.
        cutmix: alpha of the Beta distribution of cutmix's fraction; 0 turns cutmix off.
        prob: probability that a batch is mixed at all.
        switch_prob: probability of cutmix in a mixed batch, where both are on.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __bool__(self) -> bool:
        return (self.mixup > 0 or self.cutmix > 0) and self.prob > 0

    def draw(self, image_size: tuple[int, int], *key: int) -> np.ndarray:
        """Draw the mixing of one batch, a function of the integers in `key` alone.

        Returns:
            float32 [6]: the fraction of the image's own label; the fraction of its own pixels
            outside the box; the box (top, bottom, left, right) that is filled from the other image.
        """
        rng = np.random.default_rng(key)
        if rng.random() >= self.prob:
            return np.array([1, 1, 0, 0, 0, 0], np.float32)
        both = self.mixup > 0 and self.cutmix > 0
        if rng.random() < self.switch_prob if both else self.cutmix > 0:
            fraction = rng.beta(self.cutmix, self.cutmix)
            top, bottom, left, right = _random_box(fraction, image_size, rng)
            # The border may have clipped the box: use the fraction that it really leaves.
            fraction = 1 - (bottom - top) * (right - left) / (image_size[0] * image_size[1])
            return np.array([fraction, 1, top, bottom, left, right], np.float32)
        fraction = rng.beta(self.mixup, self.mixup)
        return np.array([fraction, fraction, 0, 0, 0, 0], np.float32)


def _random_box(
    fraction: float, image_size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a box around a random centre that would leave `fraction` of an unbounded image."""
    ends = []
    for edge in image_size:
        length, centre = int(edge * np.sqrt(1 - fraction)), int(rng.integers(edge))
        ends += [max(centre - length // 2, 0), min(centre + length // 2, edge)]
    return tuple(ends)
