"""The shifted depthwise convolution against the definition in numpy."""

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model
from src.models.depthwise import ShiftedDepthwise
from src.models.layers import use_shifts
from tests.conftest import TINY
from tools.check_device.reference import depthwise

pytestmark = pytest.mark.usefixtures("pynative_mode")


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 8), (7, 6)])
def test_output_and_gradients_equal_the_definition(stride, size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 5)).astype(np.float32)
    weight = rng.standard_normal((5, 1, 3, 3)).astype(np.float32)
    cell = ShiftedDepthwise(stride)
    out = cell(ms.Tensor(x), ms.Tensor(weight))
    assert out.shape == depthwise(x, weight, None, stride)[0].shape
    dout = rng.standard_normal(out.shape).astype(np.float32)

    def weighted(x, weight):
        return (cell(x, weight) * ms.Tensor(dout)).sum()

    found = out, *ms.grad(weighted, (0, 1))(ms.Tensor(x), ms.Tensor(weight))
    for value, expected in zip(found, depthwise(x, weight, dout, stride)):
        np.testing.assert_allclose(value.asnumpy(), expected, rtol=1e-5, atol=1e-5)


def twins(**options):
    """Two networks of equal weights, the second with shifts."""
    nets = [create_model("cvt_nano", **{**TINY, **options, "depths": (1, 1, 1)}) for _ in range(2)]
    for mine, other in zip(*(net.get_parameters() for net in nets)):
        mine.set_data(other.value().copy())
    return nets[0].set_train(True), use_shifts(nets[1]).set_train(True)


def training_pass(cell, forward, images):
    """The output, every gradient and the running statistics."""
    out, gradients = ms.value_and_grad(forward, None, cell.trainable_params())(images)
    statistics = [p for p in cell.get_parameters() if ".moving_" in p.name]
    return [x.asnumpy().copy() for x in (out, *gradients, *statistics)]


def assert_close(found, expected):
    for value, right in zip(found, expected, strict=True):
        atol = 1e-6 + 2e-4 * np.abs(right).max()
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("options", [{"kv_stride": 1}, {"cls_token": False}, {}])
def test_a_network_of_shifts_equals_one_of_convolutions(options):
    """With and without a class token."""
    images = ms.Tensor(np.random.default_rng(0).standard_normal((3, 3, 40, 32)), ms.float32)
    expected, found = (training_pass(net, net, images) for net in twins(**options))
    assert len(expected) > 60
    assert_close(found, expected)


def test_a_compiled_stage_of_shifts_equals_one_of_convolutions():
    """One stage and not the network, because graphs of shifts take long to compile."""
    images = ms.Tensor(np.random.default_rng(0).standard_normal((3, 3, 40, 32)), ms.float32)
    convolutions, shifts = (net.stage0 for net in twins())

    def mean_square_of(stage):
        def mean_square(images):
            return (stage(images, 40, 32, None)[0] ** 2).mean()

        return mean_square

    expected = training_pass(convolutions, mean_square_of(convolutions), images)
    ms.set_context(mode=ms.GRAPH_MODE)
    found = training_pass(shifts, mean_square_of(shifts), images)
    assert len(expected) > 20
    assert_close(found, expected)


def test_a_network_without_such_convolutions_is_refused():
    with pytest.raises(UserError, match="no convolutional projection"):
        use_shifts(create_model("cvt_nano", **TINY, qkv_projection="avg"))
