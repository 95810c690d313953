"""Preprocess images for evaluation and deployment with `mindspore.dataset.vision`'s operations.

`PILCUBIC` and `Decode` give the same pixels as Pillow, which the official evaluation uses; the
tests compare them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from mindspore.dataset import vision

from src.data.headers import MAX_PIXELS
from src.data.images import decode
from src.errors import UserError

# Only bicubic is antialiased as in Pillow. The other two sample like OpenCV, without a wider filter
# for shrinking, and differ from Pillow by up to 20-50 grey levels on a photo-like image.
_INTERPOLATIONS = {
    "bicubic": vision.Inter.PILCUBIC,
    "bilinear": vision.Inter.BILINEAR,
    "nearest": vision.Inter.NEAREST,
}


def get_interpolation(name: str) -> vision.Inter:
    """Return MindSpore's filter of that name. Raises UserError if it is unknown."""
    if name not in _INTERPOLATIONS:
        raise UserError(
            f"interpolation {name!r} is unknown; choose one of {', '.join(_INTERPOLATIONS)}"
        )
    return _INTERPOLATIONS[name]


class _ResizeToCover:
    """Resize an image, keeping its aspect, to the smallest size that covers (H, W); as timm does
    for inputs that are not square.
    """

    def __init__(self, size: tuple[int, int], interpolation: vision.Inter):
        self._size = size
        self._interpolation = interpolation

    def __call__(self, image: np.ndarray) -> np.ndarray:
        scale = max(need / have for need, have in zip(self._size, image.shape))
        size = [max(n, round(scale * h)) for n, h in zip(self._size, image.shape)]
        return vision.Resize(size, self._interpolation)(image)


class _CenterCrop:
    """Centre crop with torchvision's offset, `round((size - crop) / 2)`, half to even.

    `vision.CenterCrop` rounds down, so it is one pixel off for one size in four. This Python
    version costs 3-6 % of the evaluation pipeline (556 against 570 img/s, 224 px JPEG, 2 workers);
    without copying the slice it would cost 40 %.
    """

    def __init__(self, size: tuple[int, int]):
        self._size = size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        (height, width), (crop_h, crop_w) = image.shape[:2], self._size
        top, left = round((height - crop_h) / 2), round((width - crop_w) / 2)
        return np.ascontiguousarray(image[top : top + crop_h, left : left + crop_w])


def normalize_operations(mean: Sequence[float], std: Sequence[float]) -> list:
    """Return operations from uint8 [H, W, 3] to normalised float32 [3, H, W]; mean, std in 0..1."""
    return [
        vision.Normalize([255 * value for value in mean], [255 * value for value in std]),
        vision.HWC2CHW(),
    ]


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing for evaluation and deployment: resize, centre crop, normalise.

    Args:
        image_size: (H, W) of the network's input.
        resize: the short side in pixels (the long side keeps the aspect, rounded down), (H, W) that
            the resized image covers, keeping its aspect, or None to resize to `image_size` as the
            official evaluation at 384 px does.
        mean, std: per RGB channel, 0..1.
        interpolation: "bicubic" (Pillow's), "bilinear" or "nearest" (not antialiased).

    Raises:
        UserError: the crop is larger than the resized image, or a value is out of range.
    """

    image_size: tuple[int, int]
    resize: tuple[int, int] | int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"

    def __post_init__(self):
        for name in ("image_size", "resize", "mean", "std"):  # lists, from JSON or YAML
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise UserError(f"image_size {self.image_size} must be (height, width) in pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(
                f"mean {self.mean} and std {self.std} must have three values, std above 0"
            )
        get_interpolation(self.interpolation)
        resize = self.image_size if self.resize is None else self.resize
        resize = (resize, resize) if isinstance(resize, int) else resize
        if len(resize) != 2 or any(have < need for have, need in zip(resize, self.image_size)):
            raise UserError(
                f"resize {self.resize} is smaller than the crop, image_size {self.image_size}; "
                "enlarge resize, or set it to None to resize straight to image_size"
            )

    def operations(self, encoded: bool) -> list[Callable]:
        """Return the operations from an image to the network's input, float32 [3, H, W].

        Args:
            encoded: whether the image is a file, uint8 [bytes], instead of pixels, uint8 [H, W, 3].
        """
        interpolation = get_interpolation(self.interpolation)
        operations = [vision.Decode()] if encoded else []
        if self.resize is None:
            operations.append(vision.Resize(list(self.image_size), interpolation))
        else:
            resize = vision.Resize if isinstance(self.resize, int) else _ResizeToCover
            operations += [resize(self.resize, interpolation), _CenterCrop(self.image_size)]
        return operations + normalize_operations(self.mean, self.std)

    def __call__(self, image: np.ndarray | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Preprocess one image.

        Args:
            image: uint8 [H, W, 3], RGB, or an encoded file as `bytes` or uint8 [bytes].
            max_pixels: larger files are refused by their header.

        Returns:
            float32 [3, H, W].

        Raises:
            UserError: the file can't be read.
            ValueError: the array has another shape or type.
        """
        if isinstance(image, bytes):
            image = np.frombuffer(image, np.uint8)
        encoded = image.ndim == 1
        if image.dtype != np.uint8 or not (encoded or (image.ndim == 3 and image.shape[2] == 3)):
            raise ValueError(
                f"an image must be uint8 [H, W, 3] or [bytes], not {image.dtype} {image.shape}"
            )
        operations = self.operations(encoded)
        if encoded:
            image = decode(image, max_pixels)
            operations = operations[1:]
        for operation in operations:
            image = operation(image)
        return image

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, for `from_dict`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Create from `to_dict`'s output. Raises UserError on a missing or unknown key."""
        wrong = {field.name for field in fields(cls)} ^ set(values)
        if wrong:
            raise UserError(f"preprocessing: missing or unknown keys: {', '.join(sorted(wrong))}")
        return cls(**values)


def pad_batch(images: np.ndarray, size: int) -> np.ndarray:
    """Pad a batch [B, ...] with zero images to [size, ...]."""
    if len(images) == size:
        return images
    return np.pad(images, [(0, size - len(images)), *[(0, 0)] * (images.ndim - 1)])


def remove_decoder_dumps(since: float) -> None:
    """Remove the copies of undecodable images that MindSpore writes to the current folder.

    Args:
        since: time.time() before decoding; older files of these names are the user's.
    """
    for name in ("abnormal_image", "unsupported_image"):
        for path in Path().glob(f"{name}.*"):
            with contextlib.suppress(FileNotFoundError):  # another rank may remove it first
                if path.stat().st_mtime >= since - 1:
                    path.unlink()
