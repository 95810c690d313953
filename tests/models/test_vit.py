"""ViT against its published sizes and a few lines of numpy."""

import math

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model, uninitialised
from src.models.complexity import complexity
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

TINY = {"embed_dim": 12, "depth": 2, "num_heads": 3, "image_size": 8, "num_classes": 4}


def tiny(**options):
    return create_model("vit_nano", **{**TINY, **options}).set_train(False)


def layer_norm(x, values, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * values[f"{name}.gamma"] + values[f"{name}.beta"]


def linear(x, values, name):
    return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]


def numpy_vit(images, values, patch, heads, depth):
    """The paper's equations 1 to 4 in float64; images [B, C, H, W] -> logits."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch**2)
    weight = values["patch_embed.proj.weight"]
    x = x @ weight.reshape(len(weight), -1).T + values["patch_embed.proj.bias"]
    cls = np.broadcast_to(values["cls_token"], (batch, 1, x.shape[2]))
    x = np.concatenate((cls, x), 1) + values["pos_embed"]
    dim = x.shape[2] // heads
    erf = np.vectorize(math.erf)
    for i in range(depth):
        name = f"blocks.{i}"
        y = layer_norm(x, values, f"{name}.norm1")
        q, k, v = np.split(linear(y, values, f"{name}.attn.qkv"), 3, axis=-1)
        y = []
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            scores = np.exp(q[..., part] @ k[..., part].transpose(0, 2, 1) / math.sqrt(dim))
            y.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        x = x + linear(np.concatenate(y, -1), values, f"{name}.attn.proj")
        y = linear(layer_norm(x, values, f"{name}.norm2"), values, f"{name}.mlp.fc1")
        x = x + linear(y * (1 + erf(y / math.sqrt(2))) / 2, values, f"{name}.mlp.fc2")
    return linear(layer_norm(x, values, "norm")[:, 0], values, "head")


@pytest.mark.parametrize(
    "name, parameters, gmacs",
    [("vit_base_16", 86_567_656, 17.56), ("deit_small_16", 22_050_664, 4.60)],
)
def test_published_sizes(name, parameters, gmacs):
    """Parameters to the last one; MACs as torchvision and DeiT list them."""
    with uninitialised():
        net = create_model(name)
    assert sum(p.size for p in net.trainable_params()) == parameters
    total = complexity(net, 224).total
    assert total.parameters == parameters
    assert total.total_macs / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_nano_is_as_large_as_cvt_nano():
    with uninitialised():
        counts = [
            sum(p.size for p in create_model(name, 10).trainable_params())
            for name in ("vit_nano", "cvt_nano")
        ]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)


def test_nano_8_is_the_plain_vit_whose_cost_is_nearest_to_cvt_nano():
    """Parameters within 1 %; multiply-accumulates as near as a square patch gets."""
    vit, fine, cvt = (
        complexity(create_model(name, 10), 32).total
        for name in ("vit_nano_8", "vit_nano", "cvt_nano")
    )
    assert (vit.parameters, vit.total_macs) == (414_154, 7_177_856)
    assert vit.parameters == pytest.approx(cvt.parameters, rel=0.01)
    assert cvt.total_macs / vit.total_macs < fine.total_macs / cvt.total_macs


@pytest.mark.parametrize("options", [{"depth": 1}, {"image_size": (8, 12), "mlp_ratio": 1.5}])
def test_logits_equal_numpy(options):
    net = tiny(**options)
    values = randomise(net)
    images = noise(3, 3, *net.image_size)
    expected = numpy_vit(images.astype(np.float64), values, 4, 3, len(net.blocks))
    logits = net(ms.Tensor(images)).asnumpy()
    assert np.abs(expected).max() > 0.5
    assert np.abs(logits - expected).max() <= 1e-5
    assert np.abs(net(ms.Tensor(images[1:2])).asnumpy() - expected[1:2]).max() <= 1e-5


def test_the_graph_computes_the_same():
    net = tiny(depth=1)
    images = ms.Tensor(noise(1, 3, 8, 8))
    expected = net(images).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    assert np.abs(net(images).asnumpy() - expected).max() <= 1e-5


def test_without_a_head_the_feature_comes_out():
    net = tiny(num_classes=0, in_channels=1)
    assert net(ms.Tensor(noise(2, 1, 8, 8))).shape == (2, 12)
    assert net.forward_features(ms.Tensor(noise(2, 1, 8, 8))).shape == (2, 5, 12)


def test_drop_path_ramps_over_all_blocks():
    net = tiny(depth=3, drop_path_rate=0.2)
    rates = [(block.drop_path1.rate, block.drop_path2.rate) for block in net.blocks]
    np.testing.assert_allclose(rates, [(0, 0), (0.1, 0.1), (0.2, 0.2)])


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.5}, {"drop_rate": 0.3}])
def test_the_keys_alone_decide_the_pass(rates):
    check_keys_decide(tiny(**rates))


def test_every_random_site_is_its_own():
    net = tiny(drop_path_rate=0.2, drop_rate=0.1)
    slots = [cell.slot for _, cell in net.cells_and_names() if hasattr(cell, "slot")]
    assert sorted(slots) == list(range(net.num_rng_slots))


def test_training_lowers_the_loss():
    losses = losses_of_training(tiny(drop_path_rate=0.1))
    assert losses[-1] < losses[0]


def test_decay_freezing_and_precision():
    net = tiny()
    plain = {p.name for p in net.trainable_params() if not is_decayed(p)}
    assert {"cls_token", "pos_embed", "norm.gamma", "blocks.1.attn.qkv.bias"} <= plain
    linears = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in linears}
    decayed = {p.name for p in net.trainable_params()} - plain
    assert decayed == expected | {"patch_embed.proj.weight", "head.weight"}
    check_float16(net, ms.Tensor(noise(2, 3, 8, 8)))
    freeze(net, ["backbone"])
    assert {p.name for p in net.trainable_params()} == {"head.weight", "head.bias"}


def test_initialisation_is_deits():
    values = {p.name: p.asnumpy() for p in create_model("vit_nano").get_parameters()}
    for name in ("blocks.3.attn.qkv.weight", "head.weight", "pos_embed"):
        assert abs(values[name].std() - 0.02) < 1e-3
    assert not values["blocks.3.attn.qkv.bias"].any() and not values["head.bias"].any()
    assert 0.9 < np.abs(values["patch_embed.proj.weight"]).max() * 48**0.5 <= 1


@pytest.mark.parametrize("options, message", [
    ({"image_size": 10}, "multiples of the patch, 4"),
    ({"image_size": (8, 8, 8)}, "image_size"),
    ({"num_heads": 5}, "not a multiple"),
    ({"num_heads": [1, 2, 4]}, "num_heads .* one integer"),
    ({"depth": 0}, "depth"),
    ({"mlp_ratio": 0}, "mlp_ratio"),
    ({"mlp_ratio": "4"}, "mlp_ratio '4': must be a number"),
    ({"drop_path_rate": [0.0, 0.0, 0.1]}, "drop_path_rate .* a number"),
    ({"drop_rate": 1.0}, "drop_rate"),
    ({"num_classes": -1}, "num_classes"),
    ({"embed_dims": [8, 16, 32], "kv_stride": 1}, "vit_nano has no embed_dims, kv_stride"),
])  # fmt: skip
def test_arguments_that_make_no_network_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_images_of_another_size_are_refused():
    net = tiny()
    for shape in ((1, 1, 8, 8), (1, 3, 8, 12), (3, 8, 8)):
        with pytest.raises(ValueError, match="position embedding"):
            net(ms.Tensor(noise(*shape)))
    with pytest.raises(UserError, match="position embedding"):
        complexity(net, 12)
