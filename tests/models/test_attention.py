"""The attention product against numpy, and the door to Ascend's fused kernel."""

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import attention, create_model
from src.models.attention import ScaledDotProductAttention, use_flash_attention

pytestmark = pytest.mark.usefixtures("pynative_mode")

HEADS, DIM = 3, 16
WIDE = {"embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "depths": (1, 1, 1), "num_classes": 10}


def tensors(dtype=ms.float16, dim=DIM):
    rng = np.random.default_rng(0)
    shapes = ((2, HEADS, 17, dim), (2, HEADS, 5, dim), (2, HEADS, 5, dim))
    return [ms.Tensor(rng.standard_normal(shape).astype(np.float32), dtype) for shape in shapes]


def formula(q, k, v, scale):
    """softmax(scale q k^T) v in float64."""
    scores = scale * q @ k.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def documented(query, key, value, head_num, *, scalar_value, input_layout):
    """A stand-in for the kernel: its documented formula and conditions, in numpy."""
    assert input_layout == "BNSD" and query.shape[1] == head_num
    assert query.dtype == key.dtype == value.dtype and query.dtype in (ms.float16, ms.bfloat16)
    assert key.shape == value.shape and query.shape[3] % 16 == 0
    arrays = [x.asnumpy().astype(np.float64) for x in (query, key, value)]
    return ms.Tensor(formula(*arrays, scalar_value).astype(np.float32), query.dtype)


@pytest.mark.parametrize("dtype, limit", [(ms.float32, 5e-6), (ms.float16, 2e-3)])
def test_the_plain_product_is_the_formula(dtype, limit):
    q, k, v = tensors(dtype)
    expected = formula(*(x.asnumpy().astype(np.float64) for x in (q, k, v)), scale=0.3)
    found = ScaledDotProductAttention(HEADS, DIM, 0.3)(q, k, v)
    assert found.dtype == dtype
    assert np.abs(found.asnumpy() - expected).max() <= limit


def test_the_kernel_gets_what_its_documentation_asks_for(monkeypatch):
    """A whole network in float16 gives the same logits by either way, to half precision."""
    net = create_model("cvt_nano", **WIDE).set_train(False)
    for _, cell in net.cells_and_names():
        if isinstance(cell, (ms.nn.Dense, ms.nn.Conv2d)):
            cell.to_float(ms.float16)
    images = ms.Tensor(np.random.default_rng(0).standard_normal((2, 3, 32, 32)), ms.float32)
    names = [p.name for p in net.get_parameters()]
    plain = net(images).asnumpy()
    calls = []

    def kernel(*tensors, **options):
        calls.append(options["scalar_value"])
        return documented(*tensors, **options)

    monkeypatch.setattr(attention.ops, "flash_attention_score", kernel)
    flash = use_flash_attention(net)(images).asnumpy()
    assert calls == [16**-0.5, 32**-0.5, 64**-0.5], "the scale of the whole dimension"
    assert 0 < np.abs(flash - plain).max() <= 2e-3
    assert [p.name for p in net.get_parameters()] == names


@pytest.mark.skipif(ms.get_context("device_target") == "Ascend", reason="it has the kernel")
def test_mindspore_accepts_the_arguments():
    """Its checks of shapes, types and layout pass; what is missing here is the kernel alone."""
    cell = ScaledDotProductAttention(HEADS, DIM, 0.3)
    cell.use_flash()
    cell.num_heads = HEADS + 1
    with pytest.raises(RuntimeError, match="head_num"):
        cell(*tensors()).asnumpy()
    cell.num_heads = HEADS
    # Last, as it is raised where a result is waited for, and once more at the next call.
    with pytest.raises(RuntimeError, match="FlashAttentionScore unregistered"):
        cell(*tensors()).asnumpy()


def test_what_the_kernel_does_not_take_is_refused():
    with pytest.raises(UserError, match="has 8; change embed_dims or num_heads"):
        use_flash_attention(create_model("cvt_nano", **{**WIDE, "embed_dims": (8, 32, 64)}))
    with pytest.raises(UserError, match="the model has 528"):
        ScaledDotProductAttention(1, 528, 1.0).use_flash()
    with pytest.raises(UserError, match="257"):
        ScaledDotProductAttention(257, 16, 1.0).use_flash()
    cell = ScaledDotProductAttention(HEADS, DIM, 0.3)
    cell.use_flash()
    with pytest.raises(ValueError, match="not Float32"):
        cell(*tensors(ms.float32))
    many = ms.Tensor(np.zeros((2049, 1, 1, DIM), np.float16))
    with pytest.raises(ValueError, match="2048 images"):
        cell(many, many, many)


@pytest.mark.parametrize("name", ["cvt_13", "cvt_21", "cvt_w24"])
def test_published_variants_fit_the_kernel(name):
    sizes = {"cvt_w24": ((192, 768, 1024), (3, 12, 16))}.get(name, ((64, 192, 384), (1, 3, 6)))
    for dim, heads in zip(*sizes):
        ScaledDotProductAttention(heads, dim // heads, dim**-0.5).use_flash()
        assert dim // heads == 64
