"""RandAugment (Cubuk et al., 2019) as timm has it, which the official CvT recipe uses.

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
from src.data.keyed import Keyed
from src.errors import UserError

# How strength 0..1 and sign +-1 become an operation's argument.
ARGUMENTS = {
    "AutoContrast": lambda level, sign: None,
    "Equalize": lambda level, sign: None,
    "Invert": lambda level, sign: None,
    "Rotate": lambda level, sign: sign * 30 * level,  # degrees, counter-clockwise
    "PosterizeIncreasing": lambda level, sign: 4 - int(level * 4),  # bits to keep
    "SolarizeIncreasing": lambda level, sign: 256 - int(level * 256),  # invert from here on
    "SolarizeAdd": lambda level, sign: int(level * 110),  # grey levels for values below 128
    "ColorIncreasing": lambda level, sign: 1 + sign * 0.9 * level,  # factors
    "ContrastIncreasing": lambda level, sign: 1 + sign * 0.9 * level,
    "BrightnessIncreasing": lambda level, sign: 1 + sign * 0.9 * level,
    "SharpnessIncreasing": lambda level, sign: 1 + sign * 0.9 * level,
    "ShearX": lambda level, sign: sign * 0.3 * level,  # pixels a row
    "ShearY": lambda level, sign: sign * 0.3 * level,
    "TranslateXRel": lambda level, sign: sign * 0.45 * level,  # share of the size
    "TranslateYRel": lambda level, sign: sign * 0.45 * level,
}

_ON_PIXELS = {
    "AutoContrast": lambda _: vision.AutoContrast(),
    "ColorIncreasing": vision.AdjustSaturation,
    "ContrastIncreasing": vision.AdjustContrast,
    "BrightnessIncreasing": vision.AdjustBrightness,
    "SharpnessIncreasing": vision.AdjustSharpness,
}


class RandAugment(Keyed):
    """Apply `n` operations, drawn with replacement, each with probability `p`, to uint8 [H, W, 3].

    Their strength is normal around `m` with deviation `mstd`, cut to 0..10; signs are random.

    Python, as MindSpore's random operations are not independent (see `keyed`) and
    `vision.RandAugment` has another table of strengths and no deviation. What it applies are
    MindSpore's C++ operations, most in a tenth to a half of Pillow's time; called from Python they
    hold its lock. Cost: 0.53 ms an image at 224 px, 1.5 ms at 384, so a process
    (one device) gets 1,800 and 650 img/s at most.

    Args:
        spec: timm's string, as "rand-m9-mstd0.5-inc1"; the keys are m, n, p, mstd and inc.
        fill: colour of uncovered corners and borders, 0..255.
        interpolation: of the geometric operations.

    Raises:
        UserError: `spec` asks for what is not there.
    """

    stream = 1

    def __init__(self, spec: str, fill: Sequence[int], interpolation: vision.Inter):
        keys = parse_spec(spec)
        self._count, self._probability = int(keys["n"]), keys["p"]
        self._magnitude, self._deviation = keys["m"], keys["mstd"]
        self._fill, self._interpolation = tuple(fill), interpolation

    def change(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3] to the same."""
        names = list(ARGUMENTS)
        for pick in rng.integers(len(names), size=self._count):
            if rng.random() < self._probability:
                magnitude = min(max(rng.normal(self._magnitude, self._deviation), 0.0), 10.0)
                sign = 1 if rng.random() < 0.5 else -1
                argument = ARGUMENTS[names[pick]](magnitude / 10, sign)
                image = self.apply(image, names[pick], argument)
        return image

    def apply(self, image: np.ndarray, name: str, argument: float | None) -> np.ndarray:
        """One operation of `ARGUMENTS` with its argument; uint8 [H, W, 3] to the same."""
        if name in _ON_PIXELS:
            return _ON_PIXELS[name](argument)(image)
        if name == "Equalize":
            # Pillow, 0.3 ms at 224 px: MindSpore's C++ one takes half of that, but its values are
            # up to 14 grey levels off.
            return np.asarray(ImageOps.equalize(Image.fromarray(image)))
        # In numpy these take 0.02 ms at 224 px; a C++ operation, where there is one, 0.1 ms.
        if name == "Invert":
            return ~image
        if name == "PosterizeIncreasing":
            return image & np.uint8(256 - (1 << (8 - argument)))
        if name == "SolarizeIncreasing":
            return image ^ (np.uint8(255) * (image >= argument))
        if name == "SolarizeAdd":
            return image + np.uint8(argument) * (image < 128)
        return self._move(image, name, argument)

    def _move(self, image: np.ndarray, name: str, argument: float) -> np.ndarray:
        """Rotate about the centre, shear about the upper left corner, or translate."""
        height, width = image.shape[:2]
        degrees, shift, shear = 0.0, [0.0, 0.0], [0.0, 0.0]
        if name == "Rotate":
            degrees = -argument
        elif name.startswith("Translate"):
            shift[name == "TranslateYRel"] = -argument
        else:
            # MindSpore shears about the centre: half the other side's length is made up for.
            vertical = name == "ShearY"
            ratio = width / height if vertical else height / width
            shift[vertical] = -argument * ratio / 2
            shear[vertical] = math.degrees(math.atan(argument))
        if self._interpolation == vision.Inter.BICUBIC:  # the same pixels in less time
            if name.startswith("Translate"):
                axis = 0 if name == "TranslateYRel" else 1
                return translate(image, -argument, axis, self._fill)
            if name == "ShearX":
                return shear_x(image, shear[0], shift[0], self._fill)
        operation = vision.Affine(degrees, shift, 1.0, shear, self._interpolation, self._fill)
        return operation(image)


def parse_spec(spec: str) -> dict[str, float]:
    """timm's string to its numbers m, n, p, mstd, inc.

    Raises:
        UserError: another policy, an unknown key, a value out of range, or not the increasing set.
    """
    values = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
    policy, *parts = spec.split("-")
    if policy != "rand":
        raise UserError(f"augment.rand_augment {spec}: only the policy rand is known")
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in values:
            known = ", ".join(values)
            raise UserError(
                f"augment.rand_augment {spec}: {part!r} is unknown; the parts are {known}, each "
                "with a number behind it, as in rand-m9-mstd0.5-inc1"
            )
        values[match[1]] = float(match[2])
    whole = all(values[key].is_integer() for key in ("m", "n", "inc"))
    if not whole or values["m"] > 10 or not 1 <= values["n"] <= 20 or values["p"] > 1:
        raise UserError(
            f"augment.rand_augment {spec}: m is whole and at most 10, n whole and 1 to 20, "
            "p at most 1"
        )
    if values["inc"] != 1:
        raise UserError(
            f"augment.rand_augment {spec}: add -inc1; only timm's set of operations whose effect "
            "increases with the magnitude is there"
        )
    return values
