"""RandAugment (Cubuk et al., 2019) as in timm, which the official CvT recipe uses.

Source: timm/data/auto_augment.py, `rand_augment_transform`, its "increasing" set of operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from mindspore.dataset import vision
from PIL import Image, ImageOps

from src.data.bicubic import shear_x, translate
from src.data.per_sample import PerSampleOp
from src.errors import UserError

# Maps level 0..1 and sign +-1 to an operation's argument.
LEVEL_TO_ARG = {
    "AutoContrast": lambda level, sign: None,
    "Equalize": lambda level, sign: None,
    "Invert": lambda level, sign: None,
    "Rotate": lambda level, sign: sign * 30 * level,  # degrees, counter-clockwise
    "PosterizeIncreasing": lambda level, sign: 4 - int(level * 4),  # bits to keep
    "SolarizeIncreasing": lambda level, sign: 256 - int(level * 256),  # invert values from here on
    "SolarizeAdd": lambda level, sign: int(level * 110),  # grey levels for values below 128
    "ColorIncreasing": lambda level, sign: 1 + sign * 0.9 * level,  # factors
    "ContrastIncreasing": lambda level, sign: 1 + sign * 0.9 * level,
    "BrightnessIncreasing": lambda level, sign: 1 + sign * 0.9 * level,
    "SharpnessIncreasing": lambda level, sign: 1 + sign * 0.9 * level,
    "ShearX": lambda level, sign: sign * 0.3 * level,  # pixels per row
    "ShearY": lambda level, sign: sign * 0.3 * level,
    "TranslateXRel": lambda level, sign: sign * 0.45 * level,  # fraction of the size
    "TranslateYRel": lambda level, sign: sign * 0.45 * level,
}

_VISION_OPS = {
    "AutoContrast": lambda _: vision.AutoContrast(),
    "ColorIncreasing": vision.AdjustSaturation,
    "ContrastIncreasing": vision.AdjustContrast,
    "BrightnessIncreasing": vision.AdjustBrightness,
    "SharpnessIncreasing": vision.AdjustSharpness,
}


class RandAugment(PerSampleOp):
    """Apply `n` operations, drawn with replacement, each with probability `p`, to uint8 [H, W, 3].

    Their magnitude is normal around `m` with deviation `mstd`, or uniform in 0..`m` if `mstd` is
    above 100, and clipped to 0..10; signs are random.

    `vision.RandAugment` has other magnitudes and no deviation, and a chain of MindSpore's random
    operations is not independent (see `per_sample`), so the choice is made in Python. Colour,
    contrast, sharpness, rotation and shear along y are MindSpore's C++ operations, Equalize is
    Pillow's, the others are NumPy's. All hold Python's lock: at 0.53 ms per image at 224 px and
    1.5 ms at 384 px, a process (one device) augments at most 1,800 and 650 img/s.

    Args:
        spec: timm's string, such as "rand-m9-mstd0.5-inc1"; see `parse_spec`.
        fill: colour of uncovered corners and borders, 0..255.
        interpolation: of the geometric operations.

    Raises:
        UserError: `spec` is invalid.
    """

    stream = 1

    def __init__(self, spec: str, fill: Sequence[int], interpolation: vision.Inter):
        keys = parse_spec(spec)
        self._count, self._probability = int(keys["n"]), keys["p"]
        self._magnitude, self._deviation = keys["m"], keys["mstd"]
        self._fill, self._interpolation = tuple(fill), interpolation

    def apply(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment an image, uint8 [H, W, 3]."""
        names = list(LEVEL_TO_ARG)
        for pick in rng.integers(len(names), size=self._count):
            if rng.random() < self._probability:
                if self._deviation > 100:  # as in timm
                    magnitude = rng.uniform(0.0, self._magnitude)
                else:
                    magnitude = rng.normal(self._magnitude, self._deviation)
                sign = 1 if rng.random() < 0.5 else -1
                level = min(max(magnitude, 0.0), 10.0) / 10
                argument = LEVEL_TO_ARG[names[pick]](level, sign)
                image = self.apply_op(image, names[pick], argument)
        return image

    def apply_op(self, image: np.ndarray, name: str, argument: float | None) -> np.ndarray:
        """Apply one operation of `LEVEL_TO_ARG` to an image, uint8 [H, W, 3]."""
        if name in _VISION_OPS:
            return _VISION_OPS[name](argument)(image)
        if name == "Equalize":
            # Pillow's takes 0.3 ms at 224 px; MindSpore's half of that, but it differs from
            # Pillow's by up to 14 grey levels.
            return np.asarray(ImageOps.equalize(Image.fromarray(image)))
        # In NumPy these take 0.02 ms at 224 px; MindSpore's C++ operations take 0.1 ms.
        if name == "Invert":
            return ~image
        if name == "PosterizeIncreasing":
            return image & np.uint8(256 - (1 << (8 - argument)))
        if name == "SolarizeIncreasing":
            return image ^ (np.uint8(255) * (image >= argument))
        if name == "SolarizeAdd":
            return image + np.uint8(argument) * (image < 128)
        return self._transform(image, name, argument)

    def _transform(self, image: np.ndarray, name: str, argument: float) -> np.ndarray:
        """Rotate about the centre, shear about the top left corner, or translate."""
        height, width = image.shape[:2]
        degrees, shift, shear = 0.0, [0.0, 0.0], [0.0, 0.0]
        if name == "Rotate":
            degrees = -argument
        elif name.startswith("Translate"):
            shift[name == "TranslateYRel"] = -argument
        else:
            # MindSpore shears about the centre: compensate for half the other side's length.
            vertical = name == "ShearY"
            ratio = width / height if vertical else height / width
            shift[vertical] = -argument * ratio / 2
            shear[vertical] = math.degrees(math.atan(argument))
        if self._interpolation == vision.Inter.BICUBIC:  # same pixels, faster
            if name.startswith("Translate"):
                axis = 0 if name == "TranslateYRel" else 1
                return translate(image, -argument, axis, self._fill)
            if name == "ShearX":
                return shear_x(image, shear[0], shift[0], self._fill)
        operation = vision.Affine(degrees, shift, 1.0, shear, self._interpolation, self._fill)
        return operation(image)


def parse_spec(spec: str) -> dict[str, float]:
    """Parse timm's string into m, n, p, mstd and inc.

    Raises:
        UserError: another policy, an unknown key, a value out of range, or no -inc1.
    """
    values = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
    policy, *parts = spec.split("-")
    if policy != "rand":
        raise UserError(f"augment.rand_augment {spec}: must start with rand")
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in values:
            known = ", ".join(values)
            raise UserError(
                f"augment.rand_augment {spec}: {part!r} is unknown; use {known}, each followed "
                "by a number, as in rand-m9-mstd0.5-inc1"
            )
        values[match[1]] = float(match[2])
    whole = all(values[key].is_integer() for key in ("m", "n", "inc"))
    if not whole or values["m"] > 10 or not 1 <= values["n"] <= 20 or values["p"] > 1:
        raise UserError(
            f"augment.rand_augment {spec}: m must be an integer, at most 10, n one from 1 to 20, "
            "p at most 1"
        )
    if values["inc"] != 1:
        raise UserError(
            f'augment.rand_augment {spec}: add -inc1; only timm\'s "increasing" operations are '
            "supported"
        )
    return values
