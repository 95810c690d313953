"""The part of the input pipeline that runs on the device.

The host sends uint8 batches, a quarter of the bytes of float32, as timm does for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype


class Preprocess(nn.Cell):
    """Normalise a batch, and convert the random bytes of erased boxes to normal noise.

    Args:
        image_size: (H, W).
        mean, std: per RGB channel, in units of 0..1.
        erasing: whether each batch comes with erased boxes.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        erasing: bool = False,
    ) -> None:
        super().__init__(auto_prefix=False)
        # Subtract and divide: a multiplication by 1 / std would change the last bit.
        self.mean, self.std = (
            Tensor((255 * np.array(values)[:, None, None]).astype(np.float32))
            for values in (mean, std)
        )
        self.erasing = erasing
        if erasing:
            self.rows, self.columns = (Tensor(np.arange(n, dtype=np.int32)) for n in image_size)
            self.between = Tensor(_between(3, *image_size))

    def construct(self, images: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Compute the network's input.

        Args:
            images: uint8 [B, H, W, 3].
            boxes: int32 [B, 4] from `src.data.augment.Erase`; required with `erasing`.

        Returns:
            float32 [B, 3, H, W].
        """
        pixels = ops.transpose(images.astype(mstype.float32), (0, 3, 1, 2))  # [B, 3, H, W]
        normalised = (pixels - self.mean) / self.std
        if not self.erasing:
            return normalised
        top, bottom, left, right = ops.split(boxes.expand_dims(2), 1, 1)  # each [B, 1, 1]
        rows = ops.logical_and(self.rows >= top, self.rows < bottom)  # [B, 1, H]
        columns = ops.logical_and(self.columns >= left, self.columns < right)  # [B, 1, W]
        erased = ops.logical_and(rows.expand_dims(3), columns.expand_dims(2))  # [B, 1, H, W]
        return ops.select(erased.broadcast_to(pixels.shape), self._noise(pixels), normalised)

    def _noise(self, pixels: Tensor) -> Tensor:
        """Map uniform bytes, as float32 [B, 3, H, W], to normal noise by quantiles.

        A byte selects one of 256 equally likely intervals of the distribution, the pixel's position
        selects the point within it. Over all positions the noise is N(0, 1), not 256 values.
        """
        upper = pixels >= 128.0
        tail = (ops.select(upper, 255.0 - pixels, pixels) + self.between) / 256.0  # in (0, 1/2)
        # Abramowitz and Stegun, 26.2.23: error below 4.5e-4. ops.erfinv is slower and cuts the
        # tails at 3.4 on CPUs.
        t = ops.sqrt(-2.0 * ops.log(tail))
        over = 2.515517 + t * (0.802853 + t * 0.010328)
        under = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308))
        size = t - over / under
        return ops.select(upper, size, -size)


def _between(*shape: int) -> np.ndarray:
    """Return evenly spaced points in (0, 1), one for each element, in random order."""
    count = int(np.prod(shape))
    order = np.random.default_rng(0).permutation(count)
    return ((order + 0.5) / count).astype(np.float32).reshape(shape)
