"""Each compiled operator against MindSpore's own operators, results and gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.kernels import functions
from src.kernels.library import set_threads

# Nothing to compile; `tests/models/test_compiled.py` has them in graphs.
pytestmark = pytest.mark.usefixtures("pynative_mode")


def compare(compiled, plain, *inputs, tolerance=2e-6):
    """Results, and gradients of a weighted sum of them, relative to the largest."""
    rng = np.random.default_rng(7)
    inputs = [Tensor(array) for array in inputs]
    expected = plain(*inputs)
    weights = Tensor(rng.standard_normal(expected.shape).astype(np.float32))
    pairs = [(compiled(*inputs), expected)]
    positions = tuple(range(len(inputs)))

    def of_compiled(*inputs):
        return (compiled(*inputs) * weights).sum()

    def of_plain(*inputs):
        return (plain(*inputs) * weights).sum()

    found, wanted = (ms.grad(each, positions)(*inputs) for each in (of_compiled, of_plain))
    if len(inputs) == 1:
        found, wanted = [found], [wanted]
    for one, other in (*pairs, *zip(found, wanted)):
        one, other = one.asnumpy(), other.asnumpy()
        assert one.shape == other.shape
        assert abs(one - other).max() <= tolerance * max(abs(other).max(), 0.3)


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 5, 24), (700, 8), (1, 1, 33)])
def test_layer_norm(built, shape):
    channels = shape[-1]
    plain = ops.LayerNorm(-1, -1, 1e-5)
    compare(
        functions.LayerNorm(built, 1e-5), lambda x, g, b: plain(x, g, b)[0],
        3 * normal(*shape) + 1, 1 + normal(channels), normal(channels), tolerance=5e-6,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [1, 50, 197])
def test_softmax(built, columns):
    """ops.softmax is no reference: behind one column its gradient is wrong in PyNative (2.8.0)."""
    exponentials = lambda x: ops.exp(0.3 * x)  # noqa: E731
    compare(
        functions.Softmax(built, 0.3),
        lambda x: exponentials(x) / exponentials(x).sum(-1, keepdims=True),
        9 * normal(2, 3, 7, columns),
    )


def test_softmax_of_large_scores_is_finite(built):
    x = np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]], np.float32)
    found = functions.Softmax(built, 1.0)(Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], atol=1e-6)


def plain_convolution(x, weight, stride, height, width):
    """The convolution of what stands behind the class token, as tokens; the class token."""
    cls = x.shape[1] - height * width
    grid = x[:, cls:].transpose((0, 2, 1)).reshape((x.shape[0], x.shape[2], height, width))
    y = ops.conv2d(grid, weight, stride=stride, pad_mode="pad", padding=1, groups=x.shape[2])
    return y, x[:, :cls]


def tokens_of(y, cls):
    y = y.reshape((y.shape[0], y.shape[1], -1)).transpose((0, 2, 1))
    return ops.cat((cls, y), 1) if cls.shape[1] else y


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("cls", "height", "width"), [(0, 7, 4), (1, 4, 5), (1, 1, 1), (0, 2, 9)])
def test_convolution_and_batch_norm(built, stride, cls, height, width):
    """One operator against convolution, statistics and normalisation written out."""
    batch, channels = 5, 6
    operator = functions.ConvNorm(built, stride, 1e-5)

    def compiled(x, weight, gamma, beta):
        return operator(x, weight, gamma, beta, height, width)[0]

    def plain(x, weight, gamma, beta):
        y, token = plain_convolution(x, weight, stride, height, width)
        mean = y.mean((0, 2, 3), keep_dims=True)
        variance = ops.square(y - mean).mean((0, 2, 3), keep_dims=True)
        y = (y - mean) * ops.rsqrt(variance + 1e-5)
        return tokens_of(y * gamma.reshape((1, -1, 1, 1)) + beta.reshape((1, -1, 1, 1)), token)

    x = normal(batch, cls + height * width, channels) + 0.5
    weight = normal(channels, 1, 3, 3)
    compare(compiled, plain, x, weight, 1 + normal(channels), normal(channels), tolerance=2e-5)
    y, _ = plain_convolution(Tensor(x), Tensor(weight), stride, height, width)
    _, mean, variance = operator(
        *map(Tensor, (x, weight, normal(channels), normal(channels))), height, width
    )
    y = y.asnumpy().astype(np.float64)
    np.testing.assert_allclose(mean.asnumpy(), y.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(variance.asnumpy(), y.var((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("cls", [0, 1])
def test_convolution_with_statistics_that_stand_still(built, stride, cls):
    """In an evaluation; in training behind a frozen part the gradient passes through it."""
    operator = functions.ConvNorm(built, stride, 1e-5)

    mean, variance = Tensor(normal(8, seed=5)), Tensor(0.5 + np.abs(normal(8, seed=6)))

    def compiled(x, weight, gamma, beta):
        return operator.with_statistics(x, weight, gamma, beta, mean, variance, 3, 5)

    def plain(x, weight, gamma, beta):
        y, token = plain_convolution(x, weight, stride, 3, 5)
        scale = gamma * ops.rsqrt(variance + 1e-5)
        shift = beta - mean * scale
        return tokens_of(y * scale.reshape((1, -1, 1, 1)) + shift.reshape((1, -1, 1, 1)), token)

    compare(
        compiled, plain,
        normal(2, cls + 15, 8), normal(8, 1, 3, 3), normal(8), normal(8), tolerance=5e-6,
    )  # fmt: skip


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
    soft = functions.Softmax(built, 1.0)(Tensor(x)).asnumpy()
    assert not np.isfinite(gelu[2, 3]) and not np.isfinite(norm.asnumpy()[2]).any()
    assert np.isnan(soft[2]).any()
    for each in (gelu, norm.asnumpy(), soft):
        assert np.isfinite(each[[0, 1, 3]]).all()


def test_heads(built):
    compare(
        functions.SplitHeads(built, 3),
        lambda x, b: (x + b).reshape((2, 5, 3, 4)).transpose((0, 2, 1, 3)),
        normal(2, 5, 12), normal(12),
    )  # fmt: skip
    compare(
        functions.MergeHeads(built, 3),
        lambda x: x.transpose((0, 2, 1, 3)).reshape((2, 5, 12)),
        normal(2, 3, 5, 4),
    )  # fmt: skip


def test_operators_of_two_sizes_do_not_share_them(built):
    """MindSpore takes two operators of one name for one: sizes must come with the inputs."""

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.split = nn.CellList([functions.SplitHeads(built, n) for n in (2, 4)])
            self.merge = nn.CellList([functions.MergeHeads(built, n) for n in (2, 4)])

        def construct(self, x, bias):
            for i in range(2):
                y = self.split[i](x, bias)
                x = x + self.merge[i](y * y) * (i + 1)
            return x

    compare(
        Net(), lambda x, b: (lambda y: y + 2 * (y + b) ** 2)(x + (x + b) ** 2),
        normal(2, 5, 8), normal(8), tolerance=5e-6,
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
        (lambda built: functions.ConvNorm(built, 1, 1e-5), (None, None, None, 32, 32)),
        (lambda built: functions.BiasActivation(built, "gelu"), (None,)),
        (lambda built: functions.Unfold(built, 3, 1, 1), (32, 32)),
    ],
    ids=["layer_norm", "conv_norm", "bias_activation", "unfold"],
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


def test_sums_do_not_depend_on_the_number_of_threads(built):
    """Gradients of one thread equal those of two, to the bit."""
    norm, conv = functions.LayerNorm(built, 1e-5), functions.ConvNorm(built, 2, 1e-5)
    rows = [Tensor(each) for each in (normal(9, 400, 8), normal(8), normal(8, seed=1))]
    grid = [Tensor(normal(*shape)) for shape in ((5, 43, 8), (8, 1, 3, 3), (8,), (8,))]
    found = []
    for threads in (1, 2):
        set_threads(threads)
        sums = ms.grad(lambda *i: (norm(*i) ** 3).sum(), (0, 1, 2))(*rows)
        sums += ms.grad(lambda *i: (conv(*i, 6, 7)[0] ** 3).sum(), (0, 1, 2, 3))(*grid)
        found.append([each.asnumpy().tobytes() for each in sums])
    set_threads(None)
    assert found[0] == found[1]


def test_shapes_that_do_not_belong_together_raise(built):
    """A grid that the tokens do not fill; without the check the operator reads beyond them."""
    operator = functions.ConvNorm(built, 1, 1e-5)
    with pytest.raises(Exception, match="(?i)depthwise|custom|launch"):
        vectors = [Tensor(normal(8))] * 4
        operator.with_statistics(
            Tensor(normal(1, 4, 8)), Tensor(normal(8, 1, 3, 3)), *vectors, 9, 9
        ).asnumpy()


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint8])
def test_other_types_raise(built, dtype):
    """The operators would read their bytes as float32."""
    operator = functions.Softmax(built, 1.0)
    with pytest.raises(TypeError, match="take float32, not Tensor"):
        operator(Tensor(np.ones((4, 8), dtype))).asnumpy()
