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


@pytest.mark.parametrize(
    ("mode", "options"),
    [("pynative", {"kv_stride": 1}), ("pynative", {"cls_token": False}), ("graph", {})],
)
def test_a_network_of_shifts_equals_one_of_convolutions(mode, options):
    """Logits, every gradient and the running statistics, with and without a class token.

    Only the network of shifts is compiled.
    """
    nets = [create_model("cvt_nano", **{**TINY, **options, "depths": (1, 1, 1)}) for _ in range(2)]
    for mine, other in zip(*(net.get_parameters() for net in nets)):
        mine.set_data(other.value().copy())
    rng = np.random.default_rng(0)
    images = ms.Tensor(rng.standard_normal((3, 3, 40, 32)), ms.float32)
    found = []
    for net in (nets[0], use_shifts(nets[1])):
        if net is nets[1] and mode == "graph":
            ms.set_context(mode=ms.GRAPH_MODE)
        net.set_train(True)
        loss, gradients = ms.value_and_grad(net, None, net.trainable_params())(images)
        statistics = [p for p in net.get_parameters() if ".moving_" in p.name]
        found.append([x.asnumpy().copy() for x in (loss, *gradients, *statistics)])
    assert len(found[0]) > 60
    for expected, value in zip(*found):
        atol = 1e-6 + 2e-4 * np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=atol)


def test_a_network_without_such_convolutions_is_refused():
    with pytest.raises(UserError, match="depthwise shifts: .*no convolutional projection"):
        use_shifts(create_model("cvt_nano", **TINY, qkv_projection="avg"))
