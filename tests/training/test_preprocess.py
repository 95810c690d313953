"""What the training step makes of bytes, against the host's operations and normal noise."""

import math

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from src.data.augment import Erase
from src.data.transforms import normalize_operations
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from src.training.preprocess import Preprocess
from src.training.train_step import TrainStep

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (48, 64)


@pytest.fixture(scope="module")
def erasing() -> nn.Cell:
    return Preprocess(SIZE, MEAN, STD, erasing=True)


def random_images(count, seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, *SIZE, 3), dtype=np.uint8)


def prepared_on_the_host(image):
    for operation in normalize_operations(MEAN, STD):
        image = operation(image)
    return image


def test_normalising_equals_evaluation_s_to_the_last_bit(erasing):
    images = random_images(2)
    assert len(np.unique(images)) == 256
    expected = np.stack([prepared_on_the_host(image) for image in images])
    plain = Preprocess(SIZE, MEAN, STD)(Tensor(images)).asnumpy()
    assert plain.dtype == np.float32 and np.array_equal(plain, expected)
    nothing = np.zeros((2, 4), np.int32)
    assert np.array_equal(erasing(Tensor(images), Tensor(nothing)).asnumpy(), expected)


def test_only_the_box_is_erased(erasing):
    images = random_images(3)
    boxes = np.array([[5, 20, 30, 64], [0, 0, 0, 0], [47, 48, 0, 1]], np.int32)
    expected = np.stack([prepared_on_the_host(image) for image in images])
    changed = erasing(Tensor(images), Tensor(boxes)).asnumpy() != expected
    for found, (top, bottom, left, right) in zip(changed, boxes):
        inside = np.zeros(SIZE, bool)
        inside[top:bottom, left:right] = True
        assert not found[:, ~inside].any()
        assert (found[:, inside].sum() > 0.98 * 3 * inside.sum()) == inside.any()


def test_noise_is_normal_and_independent(erasing):
    """By moments, by its distribution function, and by what neighbours have in common."""
    whole = np.tile(np.array([0, SIZE[0], 0, SIZE[1]], np.int32), (16, 1))
    noise = np.concatenate([
        erasing(Tensor(random_images(16, seed)), Tensor(whole)).asnumpy() for seed in range(8)
    ])  # fmt: skip
    values = np.sort(noise.ravel())  # 1.2 million
    assert abs(values.mean()) < 0.004 and abs(values.std() - 1) < 0.003
    assert abs((values**3).mean()) < 0.015 and abs((values**4).mean() - 3) < 0.04
    assert 4.2 < -values[0] < 6.5 and 4.2 < values[-1] < 6.5
    exact = np.array([(1 + math.erf(z / 2**0.5)) / 2 for z in values[::997]])
    found = np.arange(len(values))[::997] / len(values)
    assert np.abs(found - exact).max() < 0.003
    each = noise.std(axis=0)  # over the images: every place has the whole distribution
    assert abs(each.mean() - 1) < 0.02 and each.min() > 0.7 and each.max() < 1.4
    pairs = ((noise[:, 0], noise[:, 1]), (noise[..., 1:], noise[..., :-1]),
             (noise[:, :, 1:], noise[:, :, :-1]), (noise[1:], noise[:-1]))  # fmt: skip
    for some, others in pairs:
        assert abs(np.corrcoef(some.ravel(), others.ravel())[0, 1]) < 0.006
        assert abs(np.corrcoef(some.ravel() ** 2, others.ravel() ** 2)[0, 1]) < 0.006


class Tiny(nn.Cell):
    """A network with one weight, quick to compile."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones((), np.float32)), name="tiny.weight")

    def construct(self, images, keys):
        return images.reshape((images.shape[0], -1))[:, 7000:7007] * self.weight


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_on_bytes_equals_one_on_prepared_images(erasing, accumulate):
    """Losses of two steps, a box in each image; the second depends on the first one's update."""
    images, labels = random_images(8), np.arange(8, dtype=np.int32) % 7
    boxes = np.array([[k, 40 + k, 2 * k, 50 + k] for k in range(8)], np.int32)
    prepared = np.concatenate([
        erasing(Tensor(images[k : k + 2]), Tensor(boxes[k : k + 2])).asnumpy()
        for k in range(0, 8, 2)
    ])  # fmt: skip
    found = []
    for preprocess in (erasing, None):
        net = Tiny()
        step = TrainStep(
            net,
            LabelSmoothingCrossEntropy(0.1),
            AdamW(net.trainable_params()),
            np.ones(9, np.float32),
            preprocess=preprocess,
            accumulate=accumulate,
        )
        step.set_train(True)
        losses = []
        for number in range(2 * accumulate):
            own = slice(2 * number, 2 * number + 2)
            some = images if preprocess is not None else prepared
            own_boxes = [Tensor(boxes[own])] * (preprocess is not None)
            result = step.run_batch(
                Tensor(some[own]), Tensor(labels[own]), None, number % accumulate, *own_boxes
            )
            losses += [float(result[0].asnumpy())] if result else []
        found.append(losses)
        assert preprocess is None or not [p for p in step.get_parameters() if "mean" in p.name]
    assert len(found[0]) == 2 and found[0] == found[1] and found[0][0] != found[0][1]


def test_boxes_of_the_host_fit(erasing):
    images, boxes = zip(
        *(
            Erase(1.0)(image, np.array([1, k], np.uint64))
            for k, image in enumerate(random_images(4))
        )
    )
    made = erasing(Tensor(np.stack(images)), Tensor(np.stack(boxes))).asnumpy()
    for image, (top, bottom, left, right), got in zip(images, boxes, made):
        again = prepared_on_the_host(image)
        again[:, top:bottom, left:right] = got[:, top:bottom, left:right]
        assert bottom > top and np.array_equal(again, got)
