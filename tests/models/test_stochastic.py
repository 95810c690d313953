"""Keyed randomness against numpy, and its effect in the network."""

import mindspore as ms
import numpy as np
import pytest

from src.models import create_model
from src.models.stochastic import Dropout, DropPath, random_bits, sample_keys, uniform
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures("pynative_mode")


def numpy_hash(x):
    x = np.asarray(x).astype(np.int64).astype(np.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def numpy_bits(keys, slots):
    counter = np.arange(slots, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return numpy_hash(counter[:, None] ^ numpy_hash(keys)[None])


def keys_of(key, count):
    return sample_keys(ms.Tensor(key, ms.int32), ms.ops.arange(count).astype(ms.int32))


@pytest.mark.parametrize("key", [0, 1, -5, 2**31 - 1])
def test_bits_equal_the_same_arithmetic_in_numpy(key):
    keys = keys_of(key, 50)
    counter = np.arange(50, dtype=np.uint32) * np.uint32(0x9E3779B9)
    expected = numpy_hash(counter ^ numpy_hash([key]))
    assert np.array_equal(keys.asnumpy().view(np.uint32), expected)
    bits = random_bits(keys, 20).asnumpy()
    assert np.array_equal(bits.view(np.uint32), numpy_bits(expected.view(np.int32), 20))


def test_uniform_is_uniform_over_images_sites_and_keys():
    numbers = uniform(random_bits(keys_of(7, 2000), 50)).asnumpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 50, (0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi-square, 49 degrees: 99.97 %
    other = uniform(random_bits(keys_of(8, 2000), 50)).asnumpy()
    for a, b in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:]), (numbers, other)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = ms.Tensor(np.ones((4000, 2, 3), np.float32))
    bits = random_bits(keys_of(3, 4000), 2)
    out = DropPath(0.25, slot=1).set_train()(x, bits).asnumpy()
    per_sample = out.reshape(4000, -1)
    assert (per_sample == per_sample[:, :1]).all()
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert abs((out > 0).mean() - 0.75) < 0.03
    other = DropPath(0.25, slot=0).set_train()(x, bits).asnumpy()
    assert 0.5 < (other == out).mean() < 0.75, "slots are independent"


def test_dropout_drops_single_elements_and_keeps_the_mean():
    x = ms.Tensor(np.ones((16, 50, 20), np.float32))
    bits = random_bits(keys_of(3, 16), 1)
    out = Dropout(0.4, slot=0).set_train()(x, bits).asnumpy()
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.6)}
    assert abs(out.mean() - 1) < 0.03
    assert not np.array_equal(out[0], out[1])


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_nothing_drops_without_bits_or_outside_training(kind):
    x = ms.Tensor(np.ones((4, 2, 3), np.float32))
    bits = random_bits(keys_of(3, 4), 1)
    assert (kind(0.9, 0).set_train()(x, None).asnumpy() == 1).all()
    assert (kind(0.9, 0).set_train(False)(x, bits).asnumpy() == 1).all(), "a frozen part"
    assert (kind(0.9, 0).set_train()(x, bits).asnumpy() != 1).any()


def test_rates_ramp_within_each_stage():
    net = create_model("cvt_13", **{**TINY, "depths": (1, 2, 3)}, drop_path_rate=(0.3, 0.2, 0.1))
    rates = [
        [(block.drop_path1.rate, block.drop_path2.rate) for block in stage.blocks]
        for stage in (net.stage0, net.stage1, net.stage2)
    ]
    assert rates == [[(0, 0)], [(0, 0), (0.2, 0.2)], [(0, 0), (0.05, 0.05), (0.1, 0.1)]]


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.5}, {"drop_rate": 0.3}])
def test_the_key_alone_decides_the_pass(rates):
    net = create_model("cvt_nano", **TINY, **rates)
    images = ms.Tensor(np.random.default_rng(0).standard_normal((4, 3, 32, 32)), ms.float32)
    net.set_train(True)
    first, second, third = (net(images, keys_of(k, 4)).asnumpy() for k in (1, 2, 1))
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)
    assert not np.array_equal(net(images).asnumpy(), net(images).asnumpy())
    net.set_train(False)
    assert np.array_equal(net(images).asnumpy(), net(images, keys_of(1, 4)).asnumpy())
