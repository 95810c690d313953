"""The fused network against the official implementation's numbers and against the plain one."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from src.deploy.fuse import fuse
from src.models import layers, resnet
from tests.deploy.networks import NETWORKS, network
from tools.check_device.golden import official

pytestmark = pytest.mark.usefixtures("pynative_mode")

CASES = {case["tag"]: case for case in official.DESCRIPTION["cases"]}
NANO = [tag for tag in CASES if tag.startswith("nano")]


def cells(net, *kinds):
    return [cell for _, cell in net.cells_and_names() if isinstance(cell, kinds)]


@pytest.mark.parametrize("tag", NANO)
def test_logits_equal_the_official_ones(tag):
    case = CASES[tag]
    logits = fuse(official.model(case))(official.images(case))
    assert np.abs(logits.asnumpy() - official.REFERENCE[f"{tag}/logits"]).max() <= 2e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_and_option_computes_the_same(name):
    net, images = network(name)
    expected = net(ms.Tensor(images)).asnumpy()
    found = fuse(net)(ms.Tensor(images)).asnumpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_fewer_operators_are_left():
    net, _ = network("conv")
    fused = fuse(net)
    assert len(cells(net, nn.BatchNorm2d)) == 3 * 4 and not cells(fused, nn.BatchNorm2d)
    assert len(cells(net, layers.QuickGELU)) == 4 and not cells(fused, layers.QuickGELU)
    for attn in cells(fused, layers.Attention):
        assert attn.attend.scale == 1
        assert [p.has_bias for p in (attn.proj_q, attn.proj_k, attn.proj_v)] == [True, False, False]
    # The class token, the last block's only query, bypasses the convolution.
    assert len(cells(net, layers.ConvProjection)) - len(cells(fused, layers.ConvProjection)) == 1
    assert not cells(fuse(network("resnet")[0]), nn.BatchNorm2d, resnet.BatchNorm2d)


def test_convolutions_are_of_the_kinds_that_ascend_has():
    """`nn.Conv2d` documents for it: one group, or in = out = group."""
    for name in NETWORKS:
        for conv in cells(fuse(network(name)[0]), nn.Conv2d):
            assert conv.group == 1 or conv.group == conv.in_channels == conv.out_channels


def test_the_trained_network_stays_as_it_is():
    net, images = network("conv")
    before = {p.name: p.asnumpy().copy() for p in net.get_parameters()}
    fused = fuse(net)
    expected = net(ms.Tensor(images)).asnumpy()
    for parameter in fused.get_parameters():
        parameter.set_data(parameter * 0)
    assert [p.name for p in net.get_parameters()] == list(before)
    assert all(np.array_equal(p.asnumpy(), before[p.name]) for p in net.get_parameters())
    assert np.array_equal(net(ms.Tensor(images)).asnumpy(), expected)
    names = [p.name for p in fused.get_parameters()]
    assert len(set(names)) == len(names)


@pytest.mark.big
def test_a_published_variant_equals_the_official_one():
    tag = "cvt_13_192x256"
    case = CASES[tag]
    logits = fuse(official.model(case))(official.images(case))
    assert np.abs(logits.asnumpy() - official.REFERENCE[f"{tag}/logits"]).max() <= 5e-5
