"""Translate and shear uint8 images in NumPy, bitwise as `vision.Affine` with BICUBIC does.

`vision.Affine` calls OpenCV's warpAffine, which sums 16 weighted pixels for each output pixel.
When each row only shifts horizontally, 12 weights are 0 and the other 4 are the same for the whole
row, which takes less than half the time. `tests/data/test_bicubic.py` compares the pixels. Shearing
along y stays with `vision.Affine`: gathering columns in NumPy takes as long.

Sources: OpenCV 4.11, modules/imgproc/src/imgwarp.cpp (`warpAffine`, `initInterTab2D`,
`remapBicubic`); MindSpore 2.8, `GetAffineMatrix`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_POSITION_BITS = 5  # 32 positions between two pixels (INTER_BITS)
_COORDINATE_BITS = 10  # fraction bits of a coordinate before it is rounded to 5 (AB_BITS)
_WEIGHT_BITS = 15  # fraction bits of a weight (INTER_REMAP_COEF_BITS)


def translate(image: np.ndarray, fraction: float, axis: int, fill: Sequence[int]) -> np.ndarray:
    """Move an image right (axis 1) or down (axis 0) by a fraction of its size.

    Args:
        image: uint8 [H, W, 3].
        fraction: of the width or height; negative values move left or up.
        fill: colour of uncovered pixels.

    Returns:
        uint8 [H, W, 3].
    """
    distance = float(np.float32(fraction) * np.float32(image.shape[axis]))
    # Along axis 0, rows move as the pixels of one long row do.
    rows = image if axis == 1 else image.reshape(1, image.shape[0], -1)
    return _slide(rows, _round(np.full(len(rows), -distance)), fill).reshape(image.shape)


def shear_x(image: np.ndarray, degrees: float, fraction: float, fill: Sequence[int]) -> np.ndarray:
    """Shear an image along x about its centre, then translate it along x.

    Args:
        image: uint8 [H, W, 3].
        degrees: rows above the centre move right if positive.
        fraction: of the width, as in `translate`.
        fill: colour of uncovered pixels.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    # float32 at each step, as in MindSpore. NumPy's own float32 tangent depends on the processor.
    slope = np.float32(math.tan(np.float32(degrees) * np.float32(math.pi) / np.float32(180)))
    centre = np.float32((height - 1) / 2)
    first = slope * centre + np.float32(fraction) * np.float32(width)  # distance of row 0
    return _slide(image, _round(np.arange(height) * float(slope) - float(first)), fill)


def _round(offsets: np.ndarray) -> np.ndarray:
    """Round offsets in pixels, float64 [N], to 32nds of a pixel as warpAffine does."""
    bits = _COORDINATE_BITS - _POSITION_BITS
    return (np.rint(offsets * (1 << _COORDINATE_BITS)).astype(np.int64) + (1 << bits - 1)) >> bits


def _slide(rows: np.ndarray, offsets: np.ndarray, fill: Sequence[int]) -> np.ndarray:
    """Sample each row at its own offset.

    Args:
        rows: uint8 [N, L, C], contiguous, C a multiple of 3.
        offsets: output pixel x of row n lies at x + offsets[n] / 32; int64 [N].
        fill: colour beyond the row's ends.

    Returns:
        uint8 [N, L, C].
    """
    count, length, channels = rows.shape
    colour = np.tile(np.array(fill, np.uint8), channels // 3)
    whole = offsets >> _POSITION_BITS
    weights = _WEIGHTS[offsets & ((1 << _POSITION_BITS) - 1)]  # [N, 4]
    # The output columns to which any row contributes a pixel.
    left = max(0, -2 - int(whole.max()))
    right = min(length, length + 1 - int(whole.min()))
    result = np.empty_like(rows)
    result[:, :left] = colour
    result[:, max(right, 0) :] = colour
    if left >= right:
        return result
    needed = right - left + 3
    start = whole + left - 1
    before = max(0, -int(start.min()))
    after = max(0, int(start.max()) + needed - length)
    padded = np.empty((count, before + length + after, channels), np.uint8)
    padded[:, :before] = colour
    padded[:, before : before + length] = rows
    padded[:, before + length :] = colour
    windows = np.lib.stride_tricks.as_strided(
        padded,
        (count, before + length + after - needed + 1, needed * channels),
        (padded.strides[0], channels, 1),
    )
    pixels = windows[np.arange(count), start + before].astype(np.int32)
    size = (right - left) * channels
    total = pixels[:, :size] * weights[:, :1]
    product = np.empty_like(total)
    for tap in range(1, 4):
        taken = pixels[:, tap * channels : tap * channels + size]
        total += np.multiply(taken, weights[:, tap : tap + 1], out=product)
    total += 1 << _WEIGHT_BITS - 1
    total >>= _WEIGHT_BITS
    np.clip(total, 0, 255, out=total)
    result[:, left:right] = total.reshape(count, -1, channels)
    return result


def _cubic_weights() -> np.ndarray:
    """Return the weights of the pixels at -1, 0, 1, 2 for 32 positions in 0..1, int32 [32, 4]."""
    a, one = np.float32(-0.75), np.float32(1)
    x = np.arange(1 << _POSITION_BITS, dtype=np.float32) / np.float32(1 << _POSITION_BITS)
    outer = ((a * (x + one) - 5 * a) * (x + one) + 8 * a) * (x + one) - 4 * a
    left, right = (((a + 2) * d - (a + 3)) * d * d + one for d in (x, one - x))
    weights = np.stack([outer, left, right, one - outer - left - right], axis=1)
    return np.rint(weights * np.float32(1 << _WEIGHT_BITS)).astype(np.int32)


_WEIGHTS = _cubic_weights()
