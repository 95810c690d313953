"""Image operations of training: crop, flip, RandAugment, colour jitter, erasing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from mindspore.dataset import vision

from src.data.headers import MAX_ASPECT
from src.data.keyed import Keyed
from src.data.rand_augment import RandAugment
from src.data.transforms import find_interpolation
from src.errors import UserError


def train_operations(
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
    """Return the operations from one item of a source to an augmented image, uint8 [H, W, 3].

    Their order is timm's. The `Keyed` among them also take the sample's key. Normalisation is the
    training step's (`src.training.preprocess`).

    Args:
        image_size: (H, W) of the network's input.
        mean: per RGB channel, in units of 0..1; RandAugment fills uncovered corners with it.
        encoded: the item is the bytes of a file, not pixels.
        crop: "random_resized": a part of the image of random area (`scale`, as a share) and aspect
            (`ratio`), resized; "pad": the whole image resized, `padding` black pixels added on each
            side, and a random crop of `image_size` from that, the habit on CIFAR.
        hflip: probability of a horizontal flip; 0 leaves the operation out.
        rand_augment: specification for `RandAugment`.
        color_jitter: brightness, contrast and saturation are multiplied by factors uniform in
            1 - this to 1 + this; 0 leaves it out.
        erasing_prob: probability for `Erase`, which comes last; 0 leaves it out.
        interpolation: as in `Preprocessing`; RandAugment rotates and shears with it too.

    Raises:
        UserError: a value makes no sense.
    """
    size, filtering = list(image_size), find_interpolation(interpolation)
    if crop == "pad" and padding >= min(size):
        raise UserError(
            f"augment.padding {padding}: must be below the image size {size}, else a crop may hold "
            "nothing of the image"
        )
    operations = _crop(size, crop, scale, ratio, padding, filtering, encoded)
    if hflip > 0:
        operations.append(vision.RandomHorizontalFlip(hflip))
    if rand_augment is not None:
        if max(size) > 6 * min(size):
            raise UserError(
                f"augment.rand_augment: MindSpore can't shear images as narrow as {size}; set null"
            )
        fill = [min(255, max(0, round(255 * value))) for value in mean]
        bicubic = filtering == vision.Inter.PILCUBIC  # which vision.Affine does not have
        filtering = vision.Inter.BICUBIC if bicubic else filtering
        operations.append(RandAugment(rand_augment, fill, filtering))
    if color_jitter > 0:
        operations.append(vision.RandomColorAdjust(color_jitter, color_jitter, color_jitter))
    if erasing_prob > 0:
        operations.append(Erase(erasing_prob))
    return operations


def _crop(
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
        # Decodes only the part of a JPEG that is kept.
        cropping = vision.RandomCropDecodeResize if encoded else vision.RandomResizedCrop
        return [cropping(size, scale, ratio, filtering)]
    if crop == "pad":
        # Resizing to the size that an image has already costs nothing (measured).
        resized = [vision.Resize(size, filtering), vision.RandomCrop(size, padding)]
        return [vision.Decode(), *resized] if encoded else resized
    raise UserError(f"crop {crop!r} is unknown; choose random_resized or pad")


class Erase(Keyed):
    """With some probability, choose a rectangle and put random bytes in its place.

    Random erasing (Zhong et al., 2017) as timm/data/random_erasing.py has it, mode "pixel", one
    rectangle: 2 % to a third of the area, aspect log-uniform in 0.3..1/0.3. The training step makes
    normal noise of the bytes (`src.training.preprocess`).

    Python, as `vision.RandomErasing` is too, but that draws from Python's global generators.

    Args:
        probability: of erasing.
    """

    stream = 2
    output = "box"

    def __init__(self, probability: float):
        self._probability = probability

    def change(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the uint8 [H, W, 3] image and its box, int32 [4]: top, bottom, left, right.

        The box is all zeros where nothing is erased.
        """
        box = self._draw(rng, *image.shape[:2])
        top, bottom, left, right = box
        if bottom > top:
            image = image.copy()
            shape = (bottom - top, right - left, image.shape[2])
            image[top:bottom, left:right] = rng.integers(256, size=shape, dtype=np.uint8)
        return image, np.array(box, np.int32)

    def _draw(self, rng: np.random.Generator, height: int, width: int) -> tuple[int, ...]:
        if rng.random() >= self._probability:
            return 0, 0, 0, 0
        for _ in range(10):  # rectangles that do not fit are drawn anew, so often at most
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                top = int(rng.integers(height - tall, endpoint=True))
                left = int(rng.integers(width - wide, endpoint=True))
                return top, top + tall, left, left + wide
        return 0, 0, 0, 0
