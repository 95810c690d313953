"""Networks in compiled operators against the official numbers, and against the plain ones."""

import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from src.models import compiled, create_model, uninitialised
from src.models.compiled import (
    CompiledAttention,
    CompiledBlock,
    CompiledConvEmbed,
    CompiledLayerNorm,
    has_plain_convolutions,
    use_compiled,
)
from src.models.layers import Attention, Block, LayerNorm
from src.models.sync_batchnorm import synchronise_batchnorm
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import SGD
from src.training.train_step import TrainStep
from tests.conftest import ROOT, TINY
from tools.check_device.golden import official

CASES = {case["tag"]: case for case in official.DESCRIPTION["cases"]}


def noise(*shape):
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def kinds(net):
    return [type(cell) for _, cell in net.cells_and_names()]


def test_every_cell_of_a_cvt_is_turned(built):
    net = create_model("cvt_nano", **TINY)
    names = [p.name for p in net.get_parameters()]
    assert has_plain_convolutions(net)
    found = kinds(use_compiled(net, built))
    assert not has_plain_convolutions(net)
    assert [p.name for p in net.get_parameters()] == names
    assert found.count(CompiledBlock) == found.count(CompiledAttention) == 4
    assert found.count(CompiledLayerNorm) == 2 * 4 + 3 + 1 and found.count(CompiledConvEmbed) == 3
    assert not {Attention, Block, LayerNorm} & set(found)


def test_what_has_no_compiled_form_stays_plain(built):
    """Dropout, other projections, shared statistics; LayerNorm and embeddings are turned."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    shared = synchronise_batchnorm(create_model("cvt_nano", **TINY), 2)
    others = [
        create_model("cvt_nano", **TINY, drop_rate=0.1),
        create_model("cvt_nano", **TINY, qkv_projection="avg"),
        create_model("cvt_nano", **TINY, qkv_projection="linear"),
    ]
    for net in (shared, *others):
        found = kinds(use_compiled(net, built))
        assert CompiledBlock not in found and CompiledAttention not in found
        assert CompiledLayerNorm in found and CompiledConvEmbed in found
    for net in others:
        assert np.isfinite(net.set_train(False)(noise(1, 3, 32, 32)).asnumpy()).all()


@pytest.mark.parametrize("tag", [tag for tag in CASES if tag.startswith("nano")])
def test_logits_equal_the_official_ones(built, tag):
    """As graphs with and without the class token, the others operator by operator."""
    graph = tag in ("nano_64", "nano_nocls_64")
    ms.set_context(mode=ms.GRAPH_MODE if graph else ms.PYNATIVE_MODE)
    check_logits(built, tag)


@pytest.mark.big
@pytest.mark.parametrize("tag", ["cvt_13_192x256", "cvt_21_224"])
def test_published_variants_equal_the_official_ones(built, tag):
    """The smaller as a graph, the other operator by operator."""
    ms.set_context(mode=ms.GRAPH_MODE if tag == "cvt_13_192x256" else ms.PYNATIVE_MODE)
    check_logits(built, tag)


def check_logits(library, tag):
    case = CASES[tag]
    with uninitialised():  # every parameter gets its official value
        net = official.model(case)
    use_compiled(net, library)
    logits = net(official.images(case)).asnumpy()
    assert np.abs(logits - official.REFERENCE[f"{tag}/logits"]).max() <= 2e-5


def results(net, images, keys):
    """Logits, gradients of their squares, running statistics behind the pass, by name."""

    def forward(images, keys):
        logits = net(images, keys)
        return (logits**2).sum(), logits

    weights = net.trainable_params()
    run = ms.value_and_grad(forward, None, weights, has_aux=True)
    (_, logits), gradients = run(images, keys)
    moving = {p.name: p for p in net.get_parameters() if "moving" in p.name}
    return {"logits": logits, **{p.name: g for p, g in zip(weights, gradients)}, **moving}


VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": (40, 24)}
WIDE = {**TINY, "embed_dims": (16, 16, 32), "num_heads": (1, 1, 2)}  # heads of whole vectors
NETS = {
    "cvt": ("cvt_nano", TINY),
    "cvt-wide_heads": ("cvt_nano", WIDE),
    "cvt-kv_stride": ("cvt_nano", {**TINY, "kv_stride": 1}),
    "cvt-no-cls_token": ("cvt_nano", {**TINY, "cls_token": False}),
    "vit": ("vit_nano", VIT),
}


@pytest.mark.parametrize(
    ("name", "options", "frozen"),
    [
        *((*net, None) for net in NETS.values()),
        (*NETS["cvt"], "stage1"),
        (*NETS["cvt"], "stage0.blocks.0.attn.conv_proj_k"),
    ],
    ids=[*NETS, "cvt-frozen", "cvt-frozen_keys"],
)
def test_training_equals_the_plain_network(built, name, options, frozen):
    check_training(built, name, options, frozen)


@pytest.mark.parametrize("net", ["cvt-wide_heads", "vit"])
def test_training_of_large_weights_equals_the_plain_network(built, monkeypatch, net):
    """Their products are MindSpore's."""
    monkeypatch.setattr(compiled, "FUSED_SIZE", 0)
    check_training(built, *NETS[net], None)


def check_training(built, name, options, frozen):
    """Logits, every gradient and every running statistic, under drop path, on odd sizes."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    plain = create_model(name, **options, drop_path_rate=0.5).set_train(True)
    turned = create_model(name, **options, drop_path_rate=0.5).set_train(True)
    for ours, theirs in zip(turned.get_parameters(), plain.get_parameters()):
        ours.set_data(theirs.value().copy())
    use_compiled(turned, built)
    for net in (plain, turned):
        for part, cell in net.cells_and_names():
            if part == frozen:
                cell.set_train(False)
    images, keys = noise(3, 3, 40, 24), ms.Tensor(np.arange(3, dtype=np.int32))
    found = {net: results(net, images, keys) for net in (plain, turned)}
    assert len(found[plain]) > 25
    for name, expected in found[plain].items():
        expected, value = expected.asnumpy(), found[turned][name].asnumpy()
        scale = max(np.abs(expected).max(), 0.1)
        assert np.abs(value - expected).max() <= 2e-5 * scale, name


def test_features_and_pyramid_are_the_plain_networks(built):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = create_model("cvt_nano", **TINY).set_train(False)
    images = noise(2, 3, 24, 40)
    expected = [*net.forward_pyramid(images), *net.forward_features(images)]
    use_compiled(net, built)
    found = [*net.forward_pyramid(images), *net.forward_features(images)]
    for one, other in zip(found, expected):
        assert one.shape == other.shape and np.abs((one - other).asnumpy()).max() <= 1e-5


PEAK = """
import re, sys
from pathlib import Path
from src.device import prepare_environment
prepare_environment()
import mindspore as ms, numpy as np
from src.models import create_model, uninitialised
from src.models import compiled
from src.kernels import operator

if sys.argv[2] == "kept":
    made = operator.operator
    operator.operator = lambda *a, recompute=False, **options: made(*a, **options)
if sys.argv[2] != "fused":
    compiled.FUSED_SIZE = 0
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
sizes = {"embed_dims": [32, 64, 128], "depths": [1, 1, 1], "num_classes": 10, "image_size": 32}
net = create_model("cvt_nano", **sizes).set_train(True)
compiled.use_compiled(net, Path(sys.argv[1]))
images = ms.Tensor(np.zeros((512, 3, 32, 32), np.float32))
before = peak()
def sums(images):
    return net(images).sum()
ms.value_and_grad(sums, None, net.trainable_params())(images)[0].asnumpy()
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_training_computes_again_what_is_large_and_cheap(built, tmp_path):
    """Peak memory without it, with it, and with fused branches: 744, 623 and 304 MB."""
    script = tmp_path / "peak.py"  # MindSpore compiles from source, which a file has
    script.write_text(PEAK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    peaks = {}
    for what in ("kept", "again", "fused"):
        command = [sys.executable, str(script), str(built), what]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        peaks[what] = float(ended.stdout.split()[-1])
    assert peaks["kept"] - peaks["again"] >= 100 and peaks["again"] - peaks["fused"] >= 250


def test_a_step_that_is_not_finite_keeps_the_running_statistics(built):
    """The operator moves them in place during the pass; the step sets them back."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = use_compiled(create_model("cvt_nano", **TINY).set_train(True), built)
    loss, rates = LabelSmoothingCrossEntropy(0.0), np.full(3, 0.1, np.float32)
    step = TrainStep(net, loss, SGD(net.trainable_params()), rates, library=built).set_train(True)
    labels = ms.Tensor(np.arange(4, dtype=np.int32))
    found = []
    for images in (noise(4, 3, 32, 32), noise(4, 3, 32, 32) * float("nan"), noise(4, 3, 32, 32)):
        step(images, labels)
        found.append(np.concatenate([p.asnumpy().ravel() for p in step.statistics]))
    assert np.array_equal(found[0], found[1])
    assert (found[1] != found[2]).all() and np.isfinite(found[2]).all()
