"""Each compiled operator against MindSpore's own operators, results and gradients."""

import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.kernels import branches, functions
from tests.kernels.reference import compare, normal, plain_attention

# Nothing to compile; `tests/models/test_compiled.py` has them in graphs.
pytestmark = pytest.mark.usefixtures("pynative_mode")


@pytest.mark.parametrize("shape", [(2, 5, 24), (700, 8), (1, 1, 33)])
def test_layer_norm(built, shape):
    channels = shape[-1]
    plain = ops.LayerNorm(-1, -1, 1e-5)
    compare(
        functions.LayerNorm(built, 1e-5), lambda x, g, b: plain(x, g, b)[0],
        3 * normal(*shape) + 1, 1 + normal(channels), normal(channels), tolerance=5e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [
        (2, 7, 1, 1, 5),
        (1, 70, 50, 3, 4),
        (9, 1, 17, 2, 16),
        (1, 130, 1100, 1, 33),
        (1, 33, 4, 1, 64),
    ],
)
def test_attention(built, batch, queries, keys, heads, width):
    """Few and many tokens, some more than a tile; head widths that are no whole vectors."""
    channels = heads * width
    compare(
        functions.Attention(built, heads, 0.3),
        plain_attention(heads, 0.3),
        normal(batch, queries, channels), normal(batch, keys, channels),
        normal(batch, keys, channels, seed=1), normal(channels), normal(channels, seed=1),
        normal(channels, seed=2), tolerance=2e-5, least=6,
    )  # fmt: skip


def test_attention_to_large_scores_is_finite(built):
    """Scores of 10,000, 0 and -10,000 at one query, of -10,000 only at another."""
    q, k = np.array([[[1.0], [-1.0]]], np.float32), np.array([[[1e4], [0.0], [-1e4]]], np.float32)
    v, zero = np.array([[[1.0], [2.0], [4.0]]], np.float32), Tensor(np.zeros(1, np.float32))
    found = functions.Attention(built, 1, 1.0)(*map(Tensor, (q, k, v)), zero, zero, zero)
    np.testing.assert_allclose(found.asnumpy().ravel(), [1, 4], atol=1e-6)


def test_bias_and_activation(built):
    plain = {"quick_gelu": lambda x: x * ops.sigmoid(1.702 * x), "gelu": nn.GELU(False)}
    for name, activation in plain.items():
        compare(
            functions.BiasActivation(built, name),
            lambda x, b, run=activation: run(x + b),
            4 * normal(600, 9), normal(9), tolerance=3e-6,
        )  # fmt: skip


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(built, value):
    """The guards of the training step see it only then."""
    x = normal(4, 8)
    x[2, 3] = value
    gelu = functions.BiasActivation(built, "quick_gelu")(Tensor(x), Tensor(normal(8))).asnumpy()
    norm = functions.LayerNorm(built, 1e-5)(Tensor(x), *map(Tensor, (normal(8), normal(8))))
    zeros = [Tensor(np.zeros(8, np.float32))] * 3
    tokens = [Tensor(each[:, None]) for each in (x, normal(4, 8), normal(4, 8))]
    attended = functions.Attention(built, 2, 1.0)(*tokens, *zeros).asnumpy()
    assert not np.isfinite(gelu[2, 3]) and not np.isfinite(norm.asnumpy()[2]).any()
    assert np.isnan(attended[2]).any()
    for each in (gelu, norm.asnumpy(), attended):
        assert np.isfinite(each[[0, 1, 3]]).all()


def test_operators_of_two_sizes_do_not_share_them(built):
    """MindSpore takes two operators of one name for one: sizes must come with the inputs."""
    two, four = (functions.Attention(built, heads, 1.0) for heads in (2, 4))
    inputs = (normal(2, 5, 8), normal(2, 3, 8), normal(2, 3, 8, seed=1), *[normal(8)] * 3)
    plain_two, plain_four = plain_attention(2, 1.0), plain_attention(4, 1.0)
    compare(
        lambda *given: two(*given) + 2 * four(*given),
        lambda *given: plain_two(*given) + 2 * plain_four(*given),
        *inputs, tolerance=2e-5, least=6,
    )  # fmt: skip


def test_residual(built):
    keep = np.array([0.0, 2.0], np.float32)
    operator = functions.BiasResidual(built)
    compare(
        lambda x, z, b: operator(x, z, b, Tensor(keep)),
        lambda x, z, b: x + Tensor(keep).reshape((2, 1, 1)) * (z + b),
        normal(2, 300, 6), normal(2, 300, 6, seed=1), normal(6),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "stride", "padding", "height", "width"),
    [(7, 4, 2, 16, 12), (3, 2, 1, 5, 6), (4, 4, 0, 8, 8), (3, 1, 1, 2, 2), (5, 2, 2, 9, 1)],
)
def test_unfold(built, size, stride, padding, height, width):
    """As a matrix product it is the convolution."""
    operator = functions.Unfold(built, size, stride, padding)
    weight = normal(4, 3, size, size)
    matrix = Tensor(weight.transpose(0, 2, 3, 1).reshape(4, -1).T.copy())

    def plain(x):
        grid = x.transpose((0, 2, 1)).reshape((2, 3, height, width))
        y = ops.conv2d(grid, Tensor(weight), stride=stride, pad_mode="pad", padding=padding)
        return y.reshape((2, 4, -1)).transpose((0, 2, 1)).reshape((-1, 4))

    compare(
        lambda x: ops.matmul(operator(x, height, width), matrix), plain,
        normal(2, height * width, 3), tolerance=5e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "rest"),
    [
        (lambda built: functions.LayerNorm(built, 1e-5), (None, None)),
        (
            lambda built: branches.ConvProjections(built, 2, 1e-5, 1e-5),
            ((), None, 32, 32),
        ),
        (lambda built: functions.BiasActivation(built, "gelu"), (None,)),
        (lambda built: functions.Unfold(built, 3, 1, 1), (32, 32)),
    ],
    ids=["layer_norm", "projections", "bias_activation", "unfold"],
)
def test_outputs_of_small_inputs_are_kept(built, build, rest):
    """Up to 2**19 elements; whether they are is an attribute of the operator."""
    operator = build(built)
    found = []
    assert (operator.kept.recompute, operator.recomputed.recompute) == (False, True)
    operator.kept = lambda *_: found.append("kept") or [None] * 4
    operator.recomputed = lambda *_: found.append("recomputed") or [None] * 4
    for rows in (512, 513):
        operator.construct(Tensor(np.zeros((rows, 1024), np.float32)), *rest)
    assert found == ["kept", "recomputed"]


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8])
def test_other_types_raise(built, dtype):
    """The operators would read their bytes as float32."""
    operator, ones = functions.BiasActivation(built, "gelu"), Tensor(np.ones(8, np.float32))
    with pytest.raises(TypeError, match="take float32, not Tensor"):
        operator(Tensor(np.ones((4, 8), dtype)), ones).asnumpy()
