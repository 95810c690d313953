"""What the tests of the baselines share."""

import mindspore as ms
import numpy as np

from src.build import set_precision
from src.models.layers import BatchNorm2d
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import SGD
from src.training.train_step import TrainStep


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomise(net):
    """Give every parameter another value, variances and scales positive; return all of them."""
    rng = np.random.default_rng(1)
    values = {}
    for parameter in net.get_parameters():
        value = 0.3 * rng.standard_normal(parameter.shape)
        if parameter.name.endswith(("gamma", "moving_variance")):
            value = 0.5 + np.abs(value)
        values[parameter.name] = value
        parameter.set_data(ms.Tensor(value.astype(np.float32)))
    return values


def losses_of_training(net, steps=5):
    """Losses of a few steps of gradient descent on one batch, PyNative."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net.set_train(True)
    optimizer = SGD(net.trainable_params())
    rates = np.full(steps, 0.05, np.float32)
    step = TrainStep(net, LabelSmoothingCrossEntropy(0.0), optimizer, rates).set_train(True)
    images, labels = ms.Tensor(noise(8, 3, 8, 8)), ms.Tensor(np.arange(8, dtype=np.int32) % 4)
    return [float(step(images, labels)[0].asnumpy()) for _ in range(steps)]


def check_keys_decide(net):
    """With drop path: equal keys give equal logits, others do not, inference needs none."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    images = ms.Tensor(noise(6, 3, 8, 8))
    keys = [ms.Tensor(np.arange(6, dtype=np.int32) + start) for start in (0, 100)]
    net.set_train(True)
    for _, cell in net.cells_and_names():
        if isinstance(cell, BatchNorm2d):
            cell.set_train(False)  # or the other images would change a sample's logits
    first, again, other = (net(images, k).asnumpy() for k in (keys[0], keys[0], keys[1]))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    reversed_ = net(images[::-1], keys[0][::-1]).asnumpy()[::-1]
    assert np.abs(reversed_ - first).max() <= 1e-5, "a key belongs to its image"
    assert not np.array_equal(net(images).asnumpy(), net(images).asnumpy())
    net.set_train(False)
    assert np.array_equal(net(images).asnumpy(), net(images, keys[0]).asnumpy())


def check_float16(net, images):
    """Half precision stays near single precision, and the logits are float32."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    exact = net(images).asnumpy()
    half = set_precision(net, "float16")(images)
    assert half.dtype == ms.float32
    error = np.abs(half.asnumpy() - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.02
