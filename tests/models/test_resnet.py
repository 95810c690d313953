"""ResNet against its published sizes and a few lines of numpy."""

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model, uninitialised
from src.models.attention import use_flash_attention
from src.models.complexity import complexity
from src.models.sync_batchnorm import SyncBatchNorm2d, synchronise_batchnorm
from src.training.freeze import freeze
from src.training.optimizer import is_decayed
from tests.models.baselines import (
    check_float16,
    check_keys_decide,
    losses_of_training,
    noise,
    randomise,
)

pytestmark = pytest.mark.usefixtures("pynative_mode")

TINY = {"depths": (1, 2), "width": 4, "num_classes": 4}


def tiny(**options):
    return create_model("resnet_nano", **{**TINY, **options}).set_train(False)


def windows(x, size, stride):
    """[B, C, H, W] -> [B, C, H', W', size, size], x padded with zeros by size // 2."""
    pad = size // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    x = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    return x[:, :, ::stride, ::stride]


def layer(x, values, name, stride=1):
    """Convolution and BatchNorm with the running statistics."""
    weight = values[f"{name}.conv.weight"]
    x = np.einsum("bchwij,ocij->bohw", windows(x, weight.shape[-1], stride), weight)
    mean, variance, gamma, beta = (
        values[f"{name}.bn.{part}"].reshape(-1, 1, 1)
        for part in ("moving_mean", "moving_variance", "gamma", "beta")
    )
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


def numpy_resnet(images, values, depths, strides, stem_stride):
    """In float64; strides: of a block's layers where the block halves the map."""
    x = np.maximum(layer(images, values, "stem", stem_stride), 0)
    if values["stem.conv.weight"].shape[-1] == 7:
        x = windows(x, 3, 2).max((-1, -2))
    for i, depth in enumerate(depths):
        for j in range(depth):
            name, halves = f"stages.{i}.blocks.{j}", i > 0 and j == 0
            y = x
            for k, stride in enumerate(strides):
                y = np.maximum(y, 0)  # of the block's input too, which is a ReLU's output
                y = layer(y, values, f"{name}.layers.{k}", stride if halves else 1)
            if f"{name}.shortcut.conv.weight" in values:
                x = layer(x, values, f"{name}.shortcut", 2 if halves else 1)
            x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ values["head.weight"].T + values["head.bias"]


def test_published_size():
    """Parameters to the last one; MACs as torchvision lists them."""
    with uninitialised():
        net = create_model("resnet_50")
    assert sum(p.size for p in net.trainable_params()) == 25_557_032
    total = complexity(net, 224).total
    assert total.parameters == 25_557_032
    assert total.total_macs / 1e9 == pytest.approx(4.09, rel=1e-3)


def test_nano_is_as_large_as_cvt_nano():
    counts = [
        complexity(create_model(name, 10), 32).total.parameters
        for name in ("resnet_nano", "cvt_nano")
    ]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)


def test_nano_s2_costs_as_much_as_cvt_nano():
    """In parameters and in multiply-accumulates."""
    resnet, cvt = (
        complexity(create_model(name, 10), 32).total for name in ("resnet_nano_s2", "cvt_nano")
    )
    assert (resnet.parameters, resnet.total_macs) == (420_325, 11_435_592)
    assert resnet.parameters == pytest.approx(cvt.parameters, rel=0.02)
    assert resnet.total_macs == pytest.approx(cvt.total_macs, rel=0.02)


@pytest.mark.parametrize(
    "options, strides, stem_stride",
    [
        ({}, (2, 1), 1),
        ({"block": "bottleneck"}, (1, 2, 1), 1),
        ({"stem": "conv7"}, (2, 1), 2),
        ({"stem": "conv3_s2"}, (2, 1), 2),
    ],
    ids=["basic", "bottleneck", "conv7", "conv3_s2"],
)
def test_logits_equal_numpy(options, strides, stem_stride):
    """On images that no stride divides."""
    net = tiny(**options)
    values = randomise(net)
    images = noise(3, 3, 15, 18)
    depths = TINY["depths"]
    expected = numpy_resnet(images.astype(np.float64), values, depths, strides, stem_stride)
    scale = np.abs(expected).max()
    assert scale > 0.5 and np.ptp(expected, axis=0).max() > 1e-2 * scale
    assert np.abs(net(ms.Tensor(images)).asnumpy() - expected).max() <= 1e-5 * scale
    alone = net(ms.Tensor(images[1:2])).asnumpy()
    assert np.abs(alone - expected[1:2]).max() <= 1e-5 * scale


def test_the_graph_computes_the_same():
    net = tiny(stem="conv7")
    images = ms.Tensor(noise(1, 3, 16, 16))
    expected = net(images).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    assert np.abs(net(images).asnumpy() - expected).max() <= 1e-5


def test_without_a_head_the_feature_comes_out():
    net = tiny(num_classes=0, in_channels=1, block="bottleneck")
    assert net(ms.Tensor(noise(1, 1, 8, 8))).shape == (1, 32)
    assert net.forward_features(ms.Tensor(noise(1, 1, 8, 8))).shape == (1, 32, 4, 4)


def test_drop_path_ramps_over_all_blocks():
    net = tiny(drop_path_rate=0.2)
    rates = [block.drop_path.rate for stage in net.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2])
    slots = [cell.slot for _, cell in net.cells_and_names() if hasattr(cell, "slot")]
    assert sorted(slots) == list(range(net.num_rng_slots))


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.5}, {"drop_rate": 0.3}])
def test_the_keys_alone_decide_the_pass(rates):
    check_keys_decide(tiny(**rates))


def test_training_lowers_the_loss():
    losses = losses_of_training(tiny(drop_path_rate=0.1))
    assert losses[-1] < losses[0]


def test_decay_freezing_and_precision():
    net = tiny()
    for parameter in net.trainable_params():
        is_weight = parameter.ndim in (2, 4)
        assert is_decayed(parameter) == is_weight, parameter.name
    check_float16(net, ms.Tensor(noise(2, 3, 8, 8)))
    freeze(net, ["stages.0", "stem"])
    left = {p.name for p in net.trainable_params()}
    assert left and all(name.startswith(("stages.1.", "head.")) for name in left)


def test_every_batchnorm_can_be_synchronised():
    """Parameters keep their names, and the new cells are the ones that compute."""
    net = tiny()
    names = [p.name for p in net.get_parameters()]
    norms = sum(name.endswith("gamma") for name in names)
    synchronise_batchnorm(net, 2)
    assert sorted(names) == sorted(p.name for p in net.get_parameters())
    cells = [cell for _, cell in net.cells_and_names() if isinstance(cell, SyncBatchNorm2d)]
    assert len(cells) == norms
    assert isinstance(net.stages[1].blocks[0].shortcut.bn, SyncBatchNorm2d)


def test_initialisation_is_kaiming_normal_by_fan_out():
    net = create_model("resnet_nano", width=32)
    weight = net.stages[2].blocks[0].layers[0].conv.weight.asnumpy()  # [128, 64, 3, 3]
    assert weight.std() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    head = net.head.weight.asnumpy()
    assert 0.99 < np.abs(head).max() * 128**0.5 <= 1


@pytest.mark.parametrize("options, message", [
    ({"depths": (1, 0)}, "depths"),
    ({"depths": ()}, "depths"),
    ({"depths": 2}, "depths 2: must be integers"),
    ({"block": "x"}, "block"),
    ({"stem": "x"}, "stem"),
    ({"width": 0}, "width"),
    ({"image_size": 1}, "2 pixels or more"),
    ({"image_size": 3, "stem": "conv3_s2"}, "4 pixels or more"),
    ({"drop_path_rate": [0.0, 0.1]}, "drop_path_rate .* a number"),
    ({"drop_rate": 1.0}, "drop_rate"),
    ({"num_classes": -1}, "num_classes"),
    ({"qkv_projection": "avg"}, "resnet_nano has no qkv_projection"),
])  # fmt: skip
def test_arguments_that_make_no_network_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_what_can_not_work_is_refused():
    net = tiny()
    for shape in ((1, 1, 8, 8), (1, 3, 8, 1), (3, 8, 8)):
        with pytest.raises(ValueError, match="images"):
            net(ms.Tensor(noise(*shape)))
    with pytest.raises(UserError, match="2 pixels or more"):
        complexity(net, 1)
    with pytest.raises(UserError, match="no attention"):
        use_flash_attention(net)
