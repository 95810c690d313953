"""Attention weights against the network's own output, and where they lie."""

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model
from src.models.attention_maps import attention_maps, attention_weights, token_centres
from src.models.compiled import use_compiled
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures("pynative_mode")

OPTIONS = [
    {},
    {"kv_stride": 1},
    {"qkv_projection": "avg"},
    {"qkv_projection": "linear"},
    {"kv_stride": 3},
]


def noise(*shape):
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(list(options.values())))
def test_weights_give_the_attention_its_output(options):
    """Applied to the values and projected they are what the cell itself returns."""
    net = create_model("cvt_nano", **TINY, **options).set_train(False)
    cell = net.stage2.blocks[0].attn
    x = noise(2, 1 + 6 * 5, 32)
    weights = attention_weights(cell, x, 6, 5).asnumpy()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    values = cell.split_heads(cell.proj_v(cell.project(x, 6, 5)[2])).asnumpy()
    mixed = (weights @ values).transpose(0, 2, 1, 3).reshape(2, 31, 32)
    expected = cell(x, 6, 5, None).asnumpy()
    assert np.abs(cell.proj(ms.Tensor(mixed)).asnumpy() - expected).max() <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(list(options.values())))
def test_maps_of_an_image_are_shares_of_one(options):
    net = create_model("cvt_nano", **TINY, **options).set_train(False)
    before = net(noise(2, 3, 40, 56)).asnumpy()
    maps = attention_maps(net, noise(2, 3, 40, 56))
    to_keys, to_self = maps.heads()
    assert to_keys.shape[:2] == (2, 4)
    np.testing.assert_allclose(to_keys.sum((2, 3)) + to_self, 1, rtol=1e-5)
    to_tokens, itself = maps.rollout()
    assert to_tokens.shape == (2, 5, 7)
    np.testing.assert_allclose(to_tokens.sum((1, 2)) + itself, 1, rtol=1e-5)
    assert maps.to_image(to_tokens).shape == maps.to_image(to_keys[:, 0]).shape == (2, 40, 56)
    assert np.array_equal(net(noise(2, 3, 40, 56)).asnumpy(), before), "the network stays"


def test_maps_of_a_compiled_network_are_the_same(built):
    """A Predictor's; its attention has other inputs."""
    net = create_model("cvt_nano", **TINY).set_train(False)
    expected = attention_maps(net, noise(2, 3, 40, 56)).mean
    found = attention_maps(use_compiled(net, built), noise(2, 3, 40, 56)).mean
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_planted_attention_lights_its_place():
    """All of the class token's weight on one key: the brightest pixel is that key's."""
    net = create_model("cvt_nano", **TINY).set_train(False)
    maps = attention_maps(net, noise(1, 3, 64, 64))
    keys = (len(maps.keys[0]), len(maps.keys[1]))
    assert keys == (4, 4) and maps.rollout()[0].shape == (1, 8, 8)
    for row, column in ((0, 0), (1, 2), (3, 1)):
        for weights in (*maps.from_cls, *maps.mean):
            weights[...] = 0
            weights[..., 1 + row * keys[1] + column] = 1
        for picture in (maps.to_image(maps.heads()[0])[0, 0], maps.to_image(maps.rollout()[0])[0]):
            brightest = np.unravel_index(picture.argmax(), picture.shape)
            wanted = (maps.keys[0][row], maps.keys[1][column])
            assert np.abs(np.subtract(brightest, wanted)).max() <= 1
            assert np.abs(np.subtract(wanted, (16 * row + 1, 16 * column + 1))).max() <= 4


def test_tokens_stand_where_the_embeddings_put_them():
    """At the centre of mass of the pixels that move a token, with plain averages."""
    patches = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
    assert token_centres(patches, np.arange(3)).tolist() == [1, 17, 33]
    weights = np.eye(160)  # of pixels in the tokens along an axis
    for size, stride, padding in patches:
        padded = np.pad(weights, ((padding, padding), (0, 0)))
        starts = range(0, len(padded) - size + 1, stride)
        weights = np.stack([padded[start : start + size].mean(0) for start in starts])
    inner = np.arange(2, len(weights) - 2)
    centres = weights[inner] @ np.arange(160) / weights[inner].sum(1)
    np.testing.assert_allclose(token_centres(patches, inner), centres)


def test_networks_and_modes_that_have_no_maps_are_refused():
    with pytest.raises(UserError, match="class token"):
        attention_maps(create_model("cvt_nano", **TINY, cls_token=False), noise(1, 3, 32, 32))
    ms.set_context(mode=ms.GRAPH_MODE)
    with pytest.raises(UserError, match="PyNative"):
        attention_maps(create_model("cvt_nano", **TINY), noise(1, 3, 32, 32))
