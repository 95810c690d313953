import math

import numpy as np
import pytest
from mindspore.dataset import vision

from src.data.bicubic import shear_x, translate

FILL = (124, 116, 104)
SIZES = [(224, 224), (97, 50), (33, 160)]


def affine(image: np.ndarray, shift: list[float], angles: list[float]) -> np.ndarray:
    operation = vision.Affine(0.0, shift, 1.0, angles, vision.Inter.BICUBIC, FILL)
    return operation(image)


@pytest.fixture(params=SIZES, ids=str)
def image(request) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*request.param, 3), np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
def test_translation_equals_mindspores(image, axis):
    random = np.random.default_rng(1).uniform(-1, 1, 40)
    for share in [0.0, 1.0, -1.0, 0.5, -1 / 64, 1 / 224, *random]:
        shift = [0.0, 0.0]
        shift[1 - axis] = float(share)
        expected = affine(image, shift, [0.0, 0.0])
        np.testing.assert_array_equal(translate(image, share, axis, FILL), expected, str(share))


def test_shear_equals_mindspores(image):
    random = np.random.default_rng(2).uniform(-1, 1, (40, 2))
    for slope, share in [(0.0, 0.0), (0.3, 0.15), (-0.3, -0.15), *(random * (0.9, 0.3))]:
        degrees = math.degrees(math.atan(slope))
        expected = affine(image, [float(share), 0.0], [degrees, 0.0])
        got = shear_x(image, degrees, share, FILL)
        np.testing.assert_array_equal(got, expected, f"{slope}, {share}")


def test_the_input_stays_as_it_is(image):
    before = image.copy()
    translate(image, 0.3, 0, FILL)
    shear_x(image, 12.0, 0.1, FILL)
    np.testing.assert_array_equal(image, before)
