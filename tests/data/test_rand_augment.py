"""Pillow, used as timm uses it, is the truth for each operation; timm's documented ranges for its
argument."""

import numpy as np
import pytest
from mindspore.dataset.vision import Inter
from PIL import Image, ImageEnhance, ImageOps

from src.data.rand_augment import LEVEL_TO_ARG, RandAugment, parse_spec
from src.errors import UserError
from tests.data.images import photo

FILL = (124, 116, 104)
OFFICIAL = "rand-m9-mstd0.5-inc1"

# At magnitude 0, 5, 9 and 10, sign plus; by hand from the ranges in timm/data/auto_augment.py.
TABLE = {
    "AutoContrast": (None, None, None, None),
    "Equalize": (None, None, None, None),
    "Invert": (None, None, None, None),
    "Rotate": (0, 15, 27, 30),
    "PosterizeIncreasing": (4, 2, 1, 0),
    "SolarizeIncreasing": (256, 128, 26, 0),
    "SolarizeAdd": (0, 55, 99, 110),
    "ColorIncreasing": (1, 1.45, 1.81, 1.9),
    "ContrastIncreasing": (1, 1.45, 1.81, 1.9),
    "BrightnessIncreasing": (1, 1.45, 1.81, 1.9),
    "SharpnessIncreasing": (1, 1.45, 1.81, 1.9),
    "ShearX": (0, 0.15, 0.27, 0.3),
    "ShearY": (0, 0.15, 0.27, 0.3),
    "TranslateXRel": (0, 0.225, 0.405, 0.45),
    "TranslateYRel": (0, 0.225, 0.405, 0.45),
}
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}


def test_arguments_follow_timms_ranges():
    assert list(LEVEL_TO_ARG) == list(TABLE)
    for name, expected in TABLE.items():
        for magnitude, value in zip((0, 5, 9, 10), expected):
            minus = LEVEL_TO_ARG[name](magnitude / 10, -1)
            assert LEVEL_TO_ARG[name](magnitude / 10, 1) == pytest.approx(value)
            if name in SIGNED:
                assert minus == pytest.approx(-value)
            elif name.endswith("Increasing") and isinstance(expected[1], float):
                assert minus == pytest.approx(2 - value)
            else:
                assert minus == pytest.approx(value)


def affine(image, *coefficients):
    return image.transform(image.size, Image.AFFINE, coefficients, Image.BICUBIC, fillcolor=FILL)


PILLOW = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Rotate": lambda image, degrees: image.rotate(degrees, Image.BICUBIC, fillcolor=FILL),
    "PosterizeIncreasing": lambda image, bits: image.point(
        [value & (0xFF00 >> bits) & 0xFF for value in range(256)] * 3
    ),
    "SolarizeIncreasing": lambda image, threshold: ImageOps.solarize(image, threshold),
    "SolarizeAdd": lambda image, add: image.point(
        [value + add if value < 128 else value for value in range(256)] * 3
    ),
    "ColorIncreasing": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "ContrastIncreasing": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "BrightnessIncreasing": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "SharpnessIncreasing": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    "ShearX": lambda image, factor: affine(image, 1, factor, 0, 0, 1, 0),
    "ShearY": lambda image, factor: affine(image, 1, 0, 0, factor, 1, 0),
    "TranslateXRel": lambda image, share: affine(image, 1, 0, share * image.size[0], 0, 1, 0),
    "TranslateYRel": lambda image, share: affine(image, 1, 0, 0, 0, 1, share * image.size[1]),
}


@pytest.mark.parametrize("size", [(144, 144), (120, 200)])
@pytest.mark.parametrize("name", TABLE)
def test_each_operation_agrees_with_pillow(name, size):
    """Within two grey levels; where pixels move, in all but a border and on average.

    MindSpore's bicubic kernel is sharper than Pillow's (a = -0.75, not -0.5), and it blends the
    border with the fill colour where Pillow cuts.
    """
    image = photo(*size, grain=4)
    before = image.copy()
    augment = RandAugment(OFFICIAL, FILL, Inter.BICUBIC)
    for magnitude in (0, 3.3, 7.4, 9, 10):
        for sign in (1, -1):
            argument = LEVEL_TO_ARG[name](magnitude / 10, sign)
            ours = augment.apply_op(image, name, argument)
            expected = np.asarray(PILLOW[name](Image.fromarray(image), argument))
            assert ours.dtype == np.uint8 and ours.shape == image.shape
            difference = np.abs(ours.astype(int) - expected)
            if name in SIGNED:
                assert difference.mean() < 1 and (difference > 8).mean() < 0.02, (magnitude, sign)
            else:
                assert difference.max() <= 2, (magnitude, sign)
    assert np.array_equal(image, before)


class Noted(RandAugment):
    """Writes down what would be applied."""

    def apply_op(self, image, name, argument):
        self.seen.append((name, argument))
        return image


def draws(spec, times):
    augment = Noted(spec, FILL, Inter.BICUBIC)
    rows = []
    for number in range(times):
        augment.seen = []
        augment(np.zeros((2, 2, 3), np.uint8), np.array([3, number], np.uint64))
        rows.append(augment.seen)
    return rows


def test_draws_follow_timms_law():
    """Two of fifteen with replacement, each with .5, strength N(9, .5) cut at 10, signs even."""
    times = 12000
    rows = draws(OFFICIAL, times)
    counts = np.bincount([len(row) for row in rows], minlength=3) / times
    np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.02)
    seen = [pair for row in rows for pair in row]
    for name in TABLE:
        share = np.mean([name == other for other, _ in seen])
        assert abs(share - 1 / 15) < 0.012
    pairs = {(row[0][0], row[1][0]) for row in rows if len(row) == 2}
    assert len(pairs) == 15 * 15
    degrees = np.array([value for name, value in seen if name == "Rotate"])
    strengths = np.abs(degrees) / 3
    assert strengths.max() == 10 and abs(strengths.mean() - 9) < 0.08
    assert abs(strengths.std() - 0.49) < 0.06 and abs((degrees > 0).mean() - 0.5) < 0.08
    bits = [value for name, value in seen if name == "PosterizeIncreasing"]
    assert set(bits) == {0, 1, 2} and np.mean(np.array(bits) == 1) > 0.95


def test_every_part_of_the_specification_counts():
    rows = draws("rand-m4-n3-p1-inc1", 100)
    assert all(len(row) == 3 for row in rows)
    assert {abs(value) for row in rows for name, value in row if name == "Rotate"} == {12.0}
    assert draws("rand-m4-p0-inc1", 20) == [[]] * 20
    expected = {"m": 9, "n": 2, "p": 0.5, "mstd": 0.5, "inc": 1}
    assert parse_spec(OFFICIAL) == expected


@pytest.mark.parametrize("deviation", ["100", "100.5", "101"])
def test_a_deviation_above_100_means_uniform_magnitudes(deviation):
    """At 100, the normal distribution puts nearly all magnitudes on the bounds 0 and 10."""
    rows = draws(f"rand-m8-mstd{deviation}-n20-p1-inc1", 1000)
    strengths = [abs(value) / 3 for row in rows for name, value in row if name == "Rotate"]
    counts = np.histogram(strengths, 4, (0, 8))[0] / len(strengths)
    if deviation == "100":
        assert max(strengths) == 10 and counts[1:].max() < 0.05
    else:
        assert max(strengths) <= 8 and counts == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize(
    "spec, match",
    [
        ("augmix-m3", "must start with rand"),
        ("rand-m9-mmax20-inc1", "'mmax20' is unknown"),
        ("rand-m9-tweights-inc1", "'tweights' is unknown"),
        ("rand-m-inc1", "'m' is unknown"),
        ("rand-m11-inc1", "at most 10"),
        ("rand-m9-n0-inc1", "1 to 20"),
        ("rand-m9-p2-inc1", "p at most 1"),
        ("rand-m9-mstd0.5", "add -inc1"),
        ("rand-m9-mstd0.5-inc0", "add -inc1"),
    ],
)
def test_what_is_not_there_is_refused(spec, match):
    with pytest.raises(UserError, match=match):
        RandAugment(spec, FILL, Inter.BICUBIC)


def test_the_key_decides():
    augment, image = RandAugment("rand-m9-mstd0.5-p1-inc1", FILL, Inter.BICUBIC), photo(32, 32)
    first, again, other = (
        augment(image, np.array([1, number], np.uint64))[0] for number in (5, 5, 6)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
