"""The fused network against the official implementation's numbers and against the plain one."""

import dataclasses
import zlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from src.deploy.fuse import FusedAttention, Rewrites, fuse
from src.models import create_model
from src.models.layers import QuickGELU
from tests.conftest import TINY
from tests.golden import official

CASES = {case["tag"]: case for case in official.DESCRIPTION["cases"]}
NANO = [tag for tag in CASES if tag.startswith("nano")]
NAMES = [field.name for field in dataclasses.fields(Rewrites)]
NONE = Rewrites(**dict.fromkeys(NAMES, False))


@pytest.fixture(autouse=True)
def pynative():
    ms.set_context(mode=ms.PYNATIVE_MODE)


def noise(*shape):
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def difference(one, other):
    return np.abs(one.asnumpy() - other.asnumpy()).max()


def cells(net, kind):
    return [cell for _, cell in net.cells_and_names() if isinstance(cell, kind)]


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
@pytest.mark.parametrize("tag", NANO)
def test_logits_equal_the_official_ones(tag, mode):
    ms.set_context(mode=mode)
    case = CASES[tag]
    logits = fuse(official.model(case))(official.images(case))
    assert np.abs(logits.asnumpy() - official.REFERENCE[f"{tag}/logits"]).max() <= 2e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "left_out"])
def test_each_rewrite_is_exact_by_itself(name, alone):
    rewrites = dataclasses.replace(NONE if alone else Rewrites(), **{name: alone})
    for tag in ("nano_64", "nano_nocls_64"):
        net, images = official.model(CASES[tag]), noise(2, 3, 48, 80)
        assert difference(fuse(net, rewrites)(images), net(images)) <= 2e-5


def test_each_rewrite_is_made():
    """What the network consists of, with one rewrite at a time and with none."""
    net = official.model(CASES["nano_64"])

    def structure(rewrites):
        fused = fuse(net, rewrites)
        attention = cells(fused, FusedAttention)[-1]
        return {
            "batch_norm": len(cells(fused, nn.BatchNorm2d)),
            "merged_kv": len(cells(fused, nn.Conv2d)),
            "scale": attention.scale,
            "activation": len(cells(fused, QuickGELU)),
            "channels_first": len(cells(fused, nn.Dense)),
            "biases": sum(p.name.endswith("bias") for p in fused.get_parameters()),
            "cls_query": hasattr(attention, "conv_q"),
        }

    plain = structure(NONE)
    assert plain["scale"] == 64**-0.5 and plain["batch_norm"] == 3 * 4 and plain["cls_query"]
    for name in NAMES:
        assert structure(dataclasses.replace(NONE, **{name: True}))[name] != plain[name]
    everything = structure(Rewrites())
    assert everything["batch_norm"] == everything["activation"] == 0
    assert everything["scale"] == 1 and not everything["cls_query"]


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_projection": "linear"},
        {"qkv_projection": "linear", "cls_token": False},
        {"qkv_projection": "avg", "kv_stride": 3},
        {"patch_embed": "patch", "kv_stride": 1},
        {"pos_embed": True, "image_size": (32, 40), "cls_token": False},
        {"num_classes": 0, "drop_path_rate": 0.1, "drop_rate": 0.1, "in_channels": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_fuse_or_pass_through(options):
    net = create_model("cvt_nano", **{**TINY, **options}).set_train(False)
    for parameter in net.get_parameters():  # nothing that a fault could leave without effect
        rng = np.random.default_rng(zlib.crc32(parameter.name.encode()))
        noise_of_it = rng.uniform(-0.3, 0.3, parameter.shape).astype(np.float32)
        parameter.set_data(parameter + ms.Tensor(noise_of_it))
    images = noise(3, options.get("in_channels", 3), 32, 40)
    assert difference(fuse(net)(images), net(images)) <= 2e-5


def test_the_trained_network_stays_as_it_is():
    net, images = official.model(CASES["nano_64"]), noise(1, 3, 32, 32)
    before = {p.name: p.asnumpy().copy() for p in net.get_parameters()}
    fused = fuse(net)
    expected = net(images)
    for parameter in fused.get_parameters():
        parameter.set_data(parameter * 0)
    assert [p.name for p in net.get_parameters()] == list(before)
    assert all(np.array_equal(p.asnumpy(), before[p.name]) for p in net.get_parameters())
    assert difference(net(images), expected) == 0
    names = [p.name for p in fused.get_parameters()]
    assert len(set(names)) == len(names)


@pytest.mark.big
@pytest.mark.parametrize("tag", ["cvt_13_192x256", "cvt_21_224"])
def test_published_variants_equal_the_official_ones(tag):
    case = CASES[tag]
    logits = fuse(official.model(case))(official.images(case))
    assert np.abs(logits.asnumpy() - official.REFERENCE[f"{tag}/logits"]).max() <= 5e-5
