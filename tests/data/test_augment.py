"""Crop, flip, jitter and erasing: what they reach, how often, and what stays as it was."""

import io

import numpy as np
import pytest
from PIL import Image

from src.data.augment import Erase, HorizontalFlip, PadCrop, create_train_operations
from src.data.base import ArraySource, FileSource
from src.data.loader import DataLoader
from src.data.per_sample import PerSampleOp
from src.data.rand_augment import RandAugment
from src.errors import UserError
from tests.data.images import MEAN, file_of, photo

# The first channel holds the row, the second the column, so a crop shows its place.


def grid(height, width):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows + 1, columns + 1, 0 * rows], -1).astype(np.uint8)


def run(operations, image):
    for operation in operations:
        keyed = isinstance(operation, PerSampleOp)
        image = operation(image, keys(1)[0])[0] if keyed else operation(image)
    return image


def test_pad_crop_and_flip_are_independent():
    """As the loader runs them: every offset occurs, and half of its images are flipped."""
    operations = create_train_operations(
        (12, 10), MEAN, encoded=False, crop="pad", padding=2, hflip=0.5
    )
    times = 2000
    source = ArraySource(np.stack([grid(12, 10)] * times), np.zeros(times, np.int32), ["a"], "grid")
    flips = {(y, x): [] for y in range(-2, 3) for x in range(-2, 3)}
    batches = DataLoader(source, operations, 500, seed=3, workers=1)
    for image in np.concatenate([images.asnumpy() for images, _ in batches]):
        rows, columns, _ = image.transpose(2, 0, 1).astype(int)
        flipped = columns[6, 4] > columns[6, 5]
        columns = columns[:, ::-1] if flipped else columns
        flips[rows[6, 5] - 7, columns[6, 5] - 6].append(flipped)
    for offset, each in flips.items():
        bound = 5 * 0.5 / np.sqrt(len(each))  # five standard deviations
        assert len(each) > 40 and abs(np.mean(each) - 0.5) < bound, offset


def test_shifts_and_flips_of_files_depend_on_no_worker(tmp_path):
    """Workers run them there, after decoding; on arrays, the reading thread does."""
    files = []
    for k in range(60):
        files.append(str(tmp_path / f"{k}.png"))
        Image.fromarray(photo(20, 30, seed=k)).save(files[-1])
    source = FileSource(files, np.zeros(60, np.int32), ["a"], "files")
    operations = create_train_operations((12, 10), MEAN, encoded=True, crop="pad")
    seen = []
    for workers in (1, 2):
        loader = DataLoader(source, operations, 20, seed=3, workers=workers)
        seen.append(np.concatenate([images.asnumpy() for images, _ in loader]))
    assert np.array_equal(*seen) and len(np.unique(seen[0], axis=0)) > 50


def test_no_flip_when_it_is_zero():
    operations = create_train_operations(
        (12, 10), MEAN, encoded=False, crop="pad", padding=0, hflip=0
    )
    for _ in range(20):
        assert np.array_equal(run(operations, grid(12, 10)), grid(12, 10))


def test_pad_crop_resizes_other_sizes_first():
    operations = create_train_operations(
        (32, 24), MEAN, encoded=True, crop="pad", padding=0, hflip=0
    )
    content = file_of(photo(80, 70))
    expected = Image.open(io.BytesIO(content)).resize((24, 32), Image.BICUBIC)
    np.testing.assert_array_equal(run(operations, np.frombuffer(content, np.uint8)), expected)


@pytest.mark.parametrize("encoded", [False, True])
def test_random_resized_crop_takes_areas_and_aspects_in_range(encoded):
    """Estimated from the slopes of the row and column ramps in the output."""
    operations = create_train_operations(
        (40, 40), MEAN, encoded=encoded, scale=(0.25, 0.5), ratio=(0.8, 1.25), hflip=0
    )
    image = grid(200, 200)
    item = np.frombuffer(file_of(image, "PNG"), np.uint8) if encoded else image
    areas, aspects = [], []
    for _ in range(200):
        rows, columns, _ = run(operations, item).transpose(2, 0, 1).astype(float)
        height = (rows[30, 20] - rows[10, 20]) * 2
        width = (columns[20, 30] - columns[20, 10]) * 2
        areas.append(height * width / 200**2)
        aspects.append(width / height)
    assert 0.22 < min(areas) < 0.28 and 0.46 < max(areas) < 0.53
    assert 0.75 < min(aspects) < 0.87 and 1.15 < max(aspects) < 1.32
    assert abs(np.mean(areas) - 0.375) < 0.03


def test_full_crop_is_pillows_bicubic_resize():
    content = file_of(photo(120, 180))
    full = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5), "hflip": 0}
    expected = Image.open(io.BytesIO(content)).resize((48, 32), Image.BICUBIC)
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    for encoded, item in ((True, np.frombuffer(content, np.uint8)), (False, pixels)):
        ours = run(create_train_operations((32, 48), MEAN, encoded=encoded, **full), item)
        assert ours.dtype == np.uint8
        np.testing.assert_array_equal(ours, expected)


def test_unknown_choices_are_refused():
    with pytest.raises(UserError, match="crop 'centre'"):
        create_train_operations((8, 8), MEAN, encoded=False, crop="centre")
    with pytest.raises(UserError, match="interpolation 'area'"):
        create_train_operations((8, 8), MEAN, encoded=False, interpolation="area")


# Operations with a key.


def keys(count):
    return [np.array([7, number], np.uint64) for number in range(count)]


def test_operations_stand_in_timms_order_and_only_where_asked_for():
    def kinds(**arguments):
        operations = create_train_operations((8, 8), MEAN, encoded=False, **arguments)
        return [type(operation).__name__ for operation in operations]

    plain = ["RandomResizedCrop", "RandomHorizontalFlip"]
    assert kinds() == plain
    every = {"rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "erasing_prob": 0.25}
    keyed = [*plain, "RandAugment", "RandomColorAdjust", "Erase"]
    assert kinds(**every) == keyed


def test_rand_augment_fills_with_the_mean_of_the_data():
    operations = create_train_operations((8, 8), MEAN, encoded=False, rand_augment="rand-inc1")
    augment = next(operation for operation in operations if isinstance(operation, RandAugment))
    moved = augment.apply_op(np.zeros((8, 8, 3), np.uint8), "TranslateXRel", 0.45)
    assert moved[4, 7].tolist() == [124, 116, 104] and moved[4, 0].tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="narrow"):
        create_train_operations((8, 50), MEAN, encoded=False, rand_augment="rand-inc1")


def test_numbers_are_those_of_a_new_generator():
    """Whatever the thread's generator drew before."""

    class Draw(PerSampleOp):
        stream = 9

        def apply(self, image, rng):
            draws = rng.integers(256, size=5, dtype=np.uint8), rng.random(3), rng.normal()
            return np.concatenate([np.ravel(each) for each in draws])

    for key in keys(3):
        fresh = np.random.Generator(np.random.Philox(key=key, counter=9 << 192))
        assert np.array_equal(Draw()(None, key)[0], Draw().apply(None, fresh))


def test_keyed_operations_do_not_share_their_numbers():
    class First(PerSampleOp):
        stream = 1

        def apply(self, image, rng):
            return rng.random(4)

    class Second(First):
        stream = 2

    seen = {tuple(kind()(None, key)[0]) for kind in (First, Second) for key in keys(3)}
    assert len(seen) == 6
    assert np.array_equal(First()(None, keys(1)[0])[0], First()(None, keys(1)[0])[0])
    assert len({op.stream for op in (RandAugment, Erase, HorizontalFlip, PadCrop)}) == 4


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_erasing_puts_random_bytes_into_rectangles_of_the_official_sizes(probability):
    """Area uniform in 2 %..1/3, less what does not fit; log aspect in -+log(0.3)."""
    height, width, times = 60, 90, 1500
    erase = Erase(probability)
    image = np.full((height, width, 3), 7, np.uint8)
    areas, aspects, tops, noise = [], [], [], []
    for key in keys(times):
        erased, (top, bottom, left, right) = erase(image, key)
        assert erased.dtype == np.uint8 and erased.shape == image.shape
        inside = np.zeros((height, width), bool)
        inside[top:bottom, left:right] = True
        assert (erased[~inside] == 7).all()
        if bottom == top:
            continue
        areas.append(inside.mean())
        aspects.append(np.log((bottom - top) / (right - left)))
        tops.append(top / (height - (bottom - top)))
        noise.append(erased[inside].T)
    assert (image == 7).all()
    assert abs(len(areas) / times - probability) < 5 * (0.25 / times) ** 0.5
    assert 0.019 < min(areas) < 0.03 and 0.3 < max(areas) < 0.34
    assert abs(np.mean(areas) - 0.1705) < 0.02  # timm's loop on 60x90, 400,000 times
    assert -1.35 < min(aspects) < -1.1 and 1.1 < max(aspects) < 1.35
    assert min(tops) == 0 and max(tops) == 1 and abs(np.mean(tops) - 0.5) < 0.08
    noise = np.concatenate(noise, axis=1)
    shares = np.bincount(noise.ravel(), minlength=256) / noise.size
    assert np.abs(256 * shares - 1).max() < 0.1, "uniform"
    assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 0.02


def test_erasing_gives_up_where_nothing_fits():
    image = np.zeros((1, 500, 3), np.uint8)
    for key in keys(20):
        erased, box = Erase(1.0)(image, key)
        assert not erased.any() and box.tolist() == [0, 0, 0, 0]


def test_jitter_scales_each_property_by_factors_in_range():
    """Grey shows brightness alone, a chequerboard contrast as well, a colour saturation as well."""
    operations = create_train_operations((8, 8), MEAN, encoded=False, color_jitter=0.4)
    jitter = next(each for each in operations if type(each).__name__ == "RandomColorAdjust")
    grey, board = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 50, np.uint8)
    board[::2] = 110
    red = np.zeros((4, 4, 3), np.uint8) + np.array([120, 80, 80], np.uint8)

    seen = np.array([jitter(grey)[0, 0] for _ in range(800)], np.float64)
    assert (seen[:, 0] == seen[:, 1]).all()
    assert 59 <= seen.min() < 62 and 138 < seen.max() <= 140
    assert abs(seen.mean() - 100) < 4 and abs(seen.std() - 80 / 12**0.5) < 2

    highs, lows = np.array([jitter(board)[:2, 0, 0] for _ in range(800)], np.float64).T
    contrast = (highs - lows) / (highs + lows) / (60 / 160)
    assert 0.57 < contrast.min() < 0.65 and 1.35 < contrast.max() < 1.43

    values = np.array([jitter(red)[0, 0] for _ in range(800)], np.float64)
    saturation = (values[:, 0] - values[:, 1]) / (values @ [0.299, 0.587, 0.114]) / (40 / 91.96)
    assert saturation.min() < 0.68 and saturation.max() > 1.32
