"""Image operations: what evaluation and deployment do between a file and the network.

The work is done by `mindspore.dataset.vision`'s C++ operations. `PILCUBIC` and `Decode` give the
pixels that Pillow gives, which the official evaluation is built on; the tests compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from mindspore.dataset import vision

from src.data.headers import MAX_PIXELS
from src.data.images import decode
from src.errors import UserError

# Only bicubic exists with Pillow's antialiasing. The other two sample like OpenCV, without a wider
# filter when shrinking: on a photo-like image they differ from Pillow by up to 20-50 grey levels.
_INTERPOLATIONS = {
    "bicubic": vision.Inter.PILCUBIC,
    "bilinear": vision.Inter.BILINEAR,
    "nearest": vision.Inter.NEAREST,
}


def find_interpolation(name: str) -> vision.Inter:
    """MindSpore's filter of that name. Raises UserError on an unknown one."""
    if name not in _INTERPOLATIONS:
        raise UserError(
            f"interpolation {name!r} is unknown; choose one of {', '.join(_INTERPOLATIONS)}"
        )
    return _INTERPOLATIONS[name]


class _CenterCrop:
    """Centre crop with torchvision's offset, `round((size - crop) / 2)`, half to even.

    Python, because `vision.CenterCrop` rounds down and so is a pixel off for one size in four. It
    costs 3-6 % of the evaluation pipeline (556 against 570 img/s, 224 px JPEG, 2 workers); handing
    the slice on without copying it costs 40 %.
    """

    def __init__(self, size: tuple[int, int]):
        self._size = size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        (height, width), (crop_h, crop_w) = image.shape[:2], self._size
        top, left = round((height - crop_h) / 2), round((width - crop_w) / 2)
        return np.ascontiguousarray(image[top : top + crop_h, left : left + crop_w])


def to_network(mean: Sequence[float], std: Sequence[float]) -> list:
    """uint8 [H, W, 3] -> float32 [3, H, W], normalised; mean and std in units of 0..1."""
    return [
        vision.Normalize([255 * value for value in mean], [255 * value for value in std]),
        vision.HWC2CHW(),
    ]


@dataclass(frozen=True)
class Preprocessing:
    """What evaluation and deployment do with an image.

    Args:
        image_size: (H, W) of the network's input.
        resize: the short side in pixels (the long side keeps the aspect, rounded down), an exact
            (H, W), or None: straight to `image_size`, as the official evaluation at 384 px does.
            A centre crop to `image_size` follows.
        mean, std: per RGB channel, in units of 0..1.
        interpolation: "bicubic" (Pillow's), "bilinear" or "nearest" (not antialiased).

    Raises:
        UserError: the crop would be larger than the resized image, or a value makes no sense.
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
            raise UserError(f"image_size {self.image_size} is no (height, width) in pixels")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(
                f"mean {self.mean} and std {self.std} must have three values, std above 0"
            )
        find_interpolation(self.interpolation)
        resize = self._resized()
        if len(resize) != 2 or any(have < need for have, need in zip(resize, self.image_size)):
            raise UserError(
                f"resize {self.resize} is smaller than the crop, image_size {self.image_size}; "
                "enlarge resize, or set it to None to resize straight to image_size"
            )

    def _resized(self) -> tuple[int, ...]:
        """The least (H, W) that an image has after resizing."""
        if self.resize is None:
            return self.image_size
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def operations(self, encoded: bool) -> list[Callable]:
        """Operations from one item of a source to the network's input, float32 [3, H, W].

        Args:
            encoded: the item is the bytes of a file, uint8 [bytes], not pixels, uint8 [H, W, 3].
        """
        size = self.resize if isinstance(self.resize, int) else list(self._resized())
        operations = [vision.Decode()] if encoded else []
        operations.append(vision.Resize(size, find_interpolation(self.interpolation)))
        if isinstance(self.resize, int) or self.resize not in (None, self.image_size):
            operations.append(_CenterCrop(self.image_size))
        return operations + to_network(self.mean, self.std)

    def __call__(self, image: np.ndarray | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Run the same operations on one image.

        Args:
            image: uint8 [H, W, 3], RGB, or an encoded file as `bytes` or uint8 [bytes].
            max_pixels: refuse larger files by their header.

        Returns:
            float32 [3, H, W].

        Raises:
            UserError: the bytes are no image that can be read.
            ValueError: an array of another shape or type.
        """
        if isinstance(image, bytes):
            image = np.frombuffer(image, np.uint8)
        encoded = image.ndim == 1
        if image.dtype != np.uint8 or not (encoded or (image.ndim == 3 and image.shape[2] == 3)):
            raise ValueError(
                f"an image is uint8 [H, W, 3] or [bytes], not {image.dtype} {image.shape}"
            )
        operations = self.operations(encoded)
        if encoded:
            image = decode(image, max_pixels)
            operations = operations[1:]
        for operation in operations:
            image = operation(image)
        return image

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them; `from_dict` is the way back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """From `to_dict`'s output, all keys given. Raises UserError on a missing or unknown key."""
        wrong = {field.name for field in fields(cls)} ^ set(values)
        if wrong:
            raise UserError(f"preprocessing: missing or unknown keys: {', '.join(sorted(wrong))}")
        return cls(**values)


def remove_dumps(since: float) -> None:
    """Take away the copies of undecodable images that MindSpore drops in the current folder.

    since: time.time() before the decoding; older files of these names are the user's.
    """
    for name in ("abnormal_image", "unsupported_image"):
        for path in Path().glob(f"{name}.*"):
            if path.stat().st_mtime >= since - 1:
                path.unlink(missing_ok=True)
