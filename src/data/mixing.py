"""Mixup and cutmix: which share of another image each image of a batch takes in.

Only the numbers are drawn here, on the host; the training step mixes on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mixing:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) of each batch with its reverse.

    Source: timm's `Mixup` in its "batch" mode, which the official CvT recipe uses.

    Args:
        mixup: alpha of the Beta distribution of mixup's share; 0 leaves mixup out.
        cutmix: alpha of cutmix's; 0 leaves cutmix out.
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
        """The mixing of one batch, a function of the integers in `key` alone.

        Returns:
            float32 [6]: the share of the own label; the share of the own pixel outside the box;
            the box (top, bottom, left, right), whose pixels come from the other image.
        """
        random = np.random.default_rng(key)
        if random.random() >= self.prob:
            return np.array([1, 1, 0, 0, 0, 0], np.float32)
        both = self.mixup > 0 and self.cutmix > 0
        if random.random() < self.switch_prob if both else self.cutmix > 0:
            top, bottom, left, right = _box(
                random.beta(self.cutmix, self.cutmix), image_size, random
            )
            # The box was cut at the image's border, so the share is what it really covers.
            share = 1 - (bottom - top) * (right - left) / (image_size[0] * image_size[1])
            return np.array([share, 1, top, bottom, left, right], np.float32)
        share = random.beta(self.mixup, self.mixup)
        return np.array([share, share, 0, 0, 0, 0], np.float32)


def _box(
    share: float, image_size: tuple[int, int], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box that would leave `share` of the image, around a centre anywhere in it."""
    ends = []
    for edge in image_size:
        length, centre = int(edge * np.sqrt(1 - share)), int(random.integers(edge))
        ends += [max(centre - length // 2, 0), min(centre + length // 2, edge)]
    return tuple(ends)
