"""Operations on training images: crop, flip, RandAugment, colour jitter, random erasing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from mindspore.dataset import vision

from src.data.headers import MAX_ASPECT
from src.data.per_sample import PerSampleOp
from src.data.rand_augment import RandAugment
from src.data.transforms import get_interpolation
from src.errors import UserError


def create_train_operations(
    image_size: tuple[int, int],
    mean: Sequence[float],
    *,
    encoded: bool,
    crop: str = "random_resized",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    padding: int = 4,
    hflip: float = 0.5,
    rand_augment: str | None = None,
    color_jitter: float = 0.0,
    erasing_prob: float = 0.0,
    interpolation: str = "bicubic",
) -> list[Callable]:
    """Create the operations from an image of a source to an augmented one, uint8 [H, W, 3].

    They follow timm's order. The training step normalises (`src.training.preprocess`).

    Args:
        image_size: (H, W) of the network's input.
        mean: per RGB channel, 0..1; RandAugment fills uncovered corners with it.
        encoded: whether images are the content of files instead of pixels.
        crop: "random_resized" resizes a random part of the image; "pad" resizes the whole image,
            adds `padding` black pixels on each side and crops `image_size` at random (usual for
            CIFAR).
        scale, ratio: ranges of the part's area, as a fraction of the image's, and aspect.
        padding: see `crop`.
        hflip: probability of a horizontal flip; 0 omits it.
        rand_augment: specification for `RandAugment`; None omits it.
        color_jitter: brightness, contrast and saturation are multiplied by factors uniform in
            1 - this to 1 + this; 0 omits it.
        erasing_prob: probability of `Erase`, the last operation; 0 omits it.
        interpolation: as in `Preprocessing`, also for RandAugment's rotations and shears.

    Raises:
        UserError: a value is out of range.
    """
    size, filtering = list(image_size), get_interpolation(interpolation)
    if crop == "pad" and padding >= min(size):
        raise UserError(
            f"augment.padding {padding}: must be below the image size {size}, or a crop may miss "
            "the image"
        )
    operations = _crop_operations(size, crop, scale, ratio, padding, filtering, encoded)
    if hflip > 0:  # after a random resized crop, MindSpore's flip is independent (measured)
        flip = HorizontalFlip if crop == "pad" else vision.RandomHorizontalFlip
        operations.append(flip(hflip))
    if rand_augment is not None:
        if max(size) > 6 * min(size):
            raise UserError(
                f"augment.rand_augment: MindSpore can't shear images as narrow as {size}; set null"
            )
        fill = [min(255, max(0, round(255 * value))) for value in mean]
        bicubic = filtering == vision.Inter.PILCUBIC  # unknown to vision.Affine
        filtering = vision.Inter.BICUBIC if bicubic else filtering
        operations.append(RandAugment(rand_augment, fill, filtering))
    if color_jitter > 0:
        operations.append(vision.RandomColorAdjust(color_jitter, color_jitter, color_jitter))
    if erasing_prob > 0:
        operations.append(Erase(erasing_prob))
    return operations


def _crop_operations(
    size: list[int],
    crop: str,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    padding: int,
    filtering: vision.Inter,
    encoded: bool,
) -> list[Callable]:
    if scale[0] > scale[1] or scale[1] > 1 or ratio[0] > ratio[1]:
        raise UserError(
            f"augment.scale {list(scale)}, augment.ratio {list(ratio)}: each is a smallest and a "
            "largest value, and no crop exceeds the image (scale 1)"
        )
    if ratio[0] < 1 / MAX_ASPECT or ratio[1] > MAX_ASPECT:
        raise UserError(f"augment.ratio {list(ratio)}: must lie in 1/{MAX_ASPECT} to {MAX_ASPECT}")
    if crop == "random_resized":
        # Decodes only the cropped part of a JPEG.
        cropping = vision.RandomCropDecodeResize if encoded else vision.RandomResizedCrop
        return [cropping(size, scale, ratio, filtering)]
    if crop == "pad":
        # Resizing an image to its own size costs nothing (measured).
        decoding = [vision.Decode(), vision.Resize(size, filtering)] if encoded else []
        return [*decoding, PadCrop(size, padding, filtering)]
    raise UserError(f"crop {crop!r} is unknown; choose random_resized or pad")


class PadCrop(PerSampleOp):
    """Resize an image and shift it at random in each direction; what is uncovered is black.

    `vision.RandomHorizontalFlip` after `vision.RandomCrop` would flip exactly the images that are
    shifted up (measured with MindSpore 2.8): both read the same sequence of random numbers.

    Args:
        size: (H, W) after resizing.
        padding: the largest shift in pixels.
        interpolation: of the resizing.
    """

    stream = 4
    in_reader = True

    def __init__(self, size: Sequence[int], padding: int, interpolation: vision.Inter):
        self._size = tuple(size)
        self._padding = padding
        self._resize = vision.Resize(list(size), interpolation)

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the shifted image, [H, W, C]."""
        if image.shape[:2] != self._size:
            image = self._resize(image)
        (height, width, channels), padding = image.shape, self._padding
        padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
        padded[padding : padding + height, padding : padding + width] = image
        top, left = (rng.integers(2 * padding + 1) for _ in range(2))
        return np.ascontiguousarray(padded[top : top + height, left : left + width])


class HorizontalFlip(PerSampleOp):
    """Flip an image horizontally.

    Args:
        probability: of a flip.
    """

    stream = 3
    in_reader = True

    def __init__(self, probability: float):
        self._probability = probability

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the image, [H, W, C], or its mirror image."""
        return np.ascontiguousarray(image[:, ::-1]) if rng.random() < self._probability else image


class Erase(PerSampleOp):
    """Random erasing (Zhong et al., 2017): fill a random rectangle with random bytes.

    Follows timm/data/random_erasing.py, mode "pixel", one rectangle: 2 % to a third of the area,
    aspect log-uniform in 0.3..1/0.3. The training step turns the bytes into normal noise
    (`src.training.preprocess`). `vision.RandomErasing` is Python too, but draws from Python's
    global generators.

    Args:
        probability: of erasing.
    """

    stream = 2
    output = "box"

    def __init__(self, probability: float):
        self._probability = probability

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the uint8 [H, W, 3] image and its box, int32 [4]: top, bottom, left, right.

        The box is all zeros if nothing is erased.
        """
        box = self._random_box(rng, *image.shape[:2])
        top, bottom, left, right = box
        if bottom > top:
            image = image.copy()
            shape = (bottom - top, right - left, image.shape[2])
            image[top:bottom, left:right] = rng.integers(256, size=shape, dtype=np.uint8)
        return image, np.array(box, np.int32)

    def _random_box(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, ...]:
        if rng.random() >= self._probability:
            return 0, 0, 0, 0
        for _ in range(10):  # attempts to draw a rectangle that fits
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top = int(rng.integers(height - tall, endpoint=True))
                left = int(rng.integers(width - wide, endpoint=True))
                return top, top + tall, left, left + wide
        return 0, 0, 0, 0
