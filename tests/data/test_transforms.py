"""Pillow and torchvision's arithmetic, written out in numpy, are the truth here."""

import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.transforms import Preprocessing, remove_decoder_dumps
from src.errors import UserError
from tests.data.images import MEAN, STD, file_of, normalised, photo


def torchvision_eval(image, short, crop):
    """Resize(short, BICUBIC), CenterCrop(crop), ToTensor, Normalize as torchvision has them."""
    height, width = image.shape[:2]
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
    top = int(round((resized.shape[0] - crop[0]) / 2.0))
    left = int(round((resized.shape[1] - crop[1]) / 2.0))
    return normalised(resized[top : top + crop[0], left : left + crop[1]])


# Widths after resizing to 256: 257, 259, 261, 263 (remainders 1 and 3 of 4, where roundings part),
# then everyday photographs, upright, tiny, and a size whose long side is not a whole number.
SIZES = [(256, 257), (256, 259), (261, 256), (263, 256)]
SIZES += [(272, 365), (500, 333), (375, 500), (60, 45), (300, 451)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", [(224, 224), (221, 160)])
def test_short_side_and_crop_agree_with_torchvision(size, crop):
    image = photo(*size)
    ours = Preprocessing(crop, 256, MEAN, STD)(image)
    assert ours.shape == (3, *crop) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, torchvision_eval(image, 256, crop), atol=2e-6)


def test_every_remainder_of_the_crop_offset():
    """Without resampling: the pixel that lands in the corner tells the offset."""
    same = Preprocessing((20, 20), 40, (0, 0, 0), (1, 1, 1))
    for width in range(40, 80):
        image = np.zeros((40, width, 3), np.uint8)
        image[:, :, 0] = np.arange(width)
        assert round(255 * float(same(image)[0, 0, 0])) == int(round((width - 20) / 2.0)), width


def test_direct_resize():
    image = photo(135, 181)
    expected = normalised(np.asarray(Image.fromarray(image).resize((64, 96), Image.BICUBIC)))
    ours = Preprocessing((96, 64), None, MEAN, STD)(image)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("image", "resized"),
    [((375, 500), (219, 292)), ((400, 400), (292, 292)), ((300, 1200), (219, 876)),
     ((500, 375), (389, 292)), ((100, 133), (220, 292)), ((219, 292), (219, 292))],
)  # fmt: skip
def test_a_crop_that_is_not_square_covers_as_much_as_timms(image, resized):
    """192 x 256 at a crop ratio of 0.875: sizes of timm's ResizeKeepRatio((219, 292))."""
    image = photo(*image)
    whole = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.BICUBIC))
    top, left = round((resized[0] - 192) / 2), round((resized[1] - 256) / 2)
    expected = normalised(whole[top : top + 192, left : left + 256])
    ours = Preprocessing((192, 256), (219, 292), MEAN, STD)(image)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize(
    "kind, mode",
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "LA")]
    + [("BMP", "RGB"), ("TIFF", "RGB")],
)
def test_files_decode_as_in_pillow(kind, mode):
    content = file_of(photo(70, 90), kind, mode)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    preprocessing = Preprocessing((32, 32), 40, MEAN, STD)
    expected = torchvision_eval(pixels, 40, (32, 32))
    np.testing.assert_allclose(preprocessing(content), expected, atol=2e-6)
    array = np.frombuffer(content, np.uint8)
    assert np.array_equal(preprocessing(array), preprocessing(pixels))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_other_interpolations_agree_with_pillow_on_an_integer_enlargement(interpolation):
    image = photo(20, 30)
    filtering = getattr(Image, interpolation.upper())
    expected = normalised(Image.fromarray(image).resize((90, 60), filtering))
    ours = Preprocessing((60, 90), None, MEAN, STD, interpolation)(image)
    one_level = 1 / 255 / min(STD)
    np.testing.assert_allclose(ours, expected, atol=1.01 * one_level)


def test_json_round_trip():
    for resize in (256, None, [240, 250]):
        given = Preprocessing([224, 192], resize, list(MEAN), STD)
        assert Preprocessing.from_dict(json.loads(json.dumps(given.to_dict()))) == given
        assert given.image_size == (224, 192)
    with pytest.raises(UserError, match="crop_pct"):
        Preprocessing.from_dict({**given.to_dict(), "crop_pct": 0.875})
    with pytest.raises(UserError, match="std"):
        Preprocessing.from_dict({k: v for k, v in given.to_dict().items() if k != "std"})


@pytest.mark.parametrize(
    "change, match",
    [
        ({"resize": 191}, "resize 191 is smaller"),
        ({"resize": (192, 223)}, "smaller than the crop"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"std": (0.2, 0.2, 0)}, "std"),
        ({"mean": (0.5,)}, "three values"),
        ({"image_size": (0, 224)}, "image_size"),
    ],
)
def test_senseless_values_are_refused(change, match):
    good = {"image_size": (192, 224), "resize": 224, "mean": MEAN, "std": STD}
    Preprocessing(**good)
    with pytest.raises(UserError, match=match):
        Preprocessing(**{**good, **change})


def test_what_is_no_image_is_refused():
    preprocessing = Preprocessing((32, 32), None, MEAN, STD)
    whole = file_of(photo(50, 50))
    bad = [whole[:length] for length in range(0, len(whole) - 2, 20)]
    codes = whole.index(b"\xff\xc4") + 5
    bad += [whole[:codes] + b"\xff" * 8 + whole[codes + 8 :]]  # MindSpore alone ends with SIGSEGV
    bad += [b"hello", b"\xff\xd8\xff" + b"x" * 50, file_of(photo(50, 50), "GIF")]
    for content in bad:
        with pytest.raises(UserError, match="not a readable image"):
            preprocessing(content)
    for wrong in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            preprocessing(wrong)


def test_another_rank_may_remove_the_decoders_dumps_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("abnormal_image.1.jpg", "abnormal_image.2.jpg"):
        (tmp_path / name).touch()
    stat = Path.stat

    def removed(path, **keywords):
        if path.name == "abnormal_image.1.jpg":
            path.unlink(missing_ok=True)
        return stat(path, **keywords)

    monkeypatch.setattr(Path, "stat", removed)
    remove_decoder_dumps(time.time())
    assert not os.listdir(tmp_path)
