"""Compiled embeddings, projections and branches against MindSpore's operators, with gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.kernels import branches
from src.kernels.library import set_threads
from tests.kernels.reference import compare, normal, plain_attention

# Nothing to compile; `tests/models/test_compiled.py` has them in graphs.
pytestmark = pytest.mark.usefixtures("pynative_mode")


def layer_norm(x, gamma, beta):
    mean = x.mean(-1, keep_dims=True)
    variance = ops.square(x - mean).mean(-1, keep_dims=True)
    return (x - mean) * ops.rsqrt(variance + 1e-5) * gamma + beta


def plain_projection(x, weight, gamma, beta, stride, grid, statistics=None):
    """Convolution and BatchNorm of what stands behind the class token; also its statistics."""
    cls = x.shape[1] - grid[0] * grid[1]
    maps = x[:, cls:].transpose((0, 2, 1)).reshape((x.shape[0], x.shape[2], *grid))
    z = ops.conv2d(maps, weight, stride=stride, pad_mode="pad", padding=1, groups=x.shape[2])
    z = z.reshape((z.shape[0], z.shape[1], -1)).transpose((0, 2, 1))
    if statistics is None:
        mean = z.mean((0, 1))
        statistics = mean, ops.square(z - mean).mean((0, 1))
    mean, variance = statistics
    y = (z - mean) * ops.rsqrt(variance + 1e-5) * gamma + beta
    return ops.cat((x[:, :cls], y), 1) if cls else y, mean, variance


def projection_inputs(batch, cls, grid, channels):
    """x, LayerNorm's gamma and beta, weights, gammas, betas; means and variances."""
    x = 2 * normal(batch, cls + grid[0] * grid[1], channels) + 0.5
    norm = [1 + normal(channels, seed=1), normal(channels, seed=2)]
    weights = [normal(channels, 1, 3, 3, seed=i) for i in range(3)]
    affine = [normal(channels, seed=i) + (i < 6) for i in range(3, 9)]
    means = [normal(channels, seed=i) for i in range(9, 12)]
    variances = [0.5 + np.abs(normal(channels, seed=i)) for i in range(12, 15)]
    return [x, *norm, *weights, *affine], list(map(Tensor, means + variances))


def joined(three):
    """Queries, keys and values with different factors, so that their gradients differ."""
    return ops.cat([(i + 1) * y for i, y in enumerate(three)], 1)


def plain_projections(strides, grid, given):
    """As `ConvProjections`; given: three (mean, variance) or None."""

    def run(x, gamma, beta, *others):
        x = layer_norm(x, gamma, beta)
        return [plain_projection(x, *others[i::3], strides[i], grid, given[i])[0] for i in range(3)]

    return run


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("cls", "grid", "channels"),
    [(0, (7, 4), 6), (1, (4, 5), 16), (1, (1, 1), 33), (0, (2, 9), 5)],
)
@pytest.mark.parametrize("learns", [(1, 1, 1), (1, 0, 1)])
def test_projections(built, stride, cls, grid, channels, learns):
    """By the batch's statistics, or keys by given ones; channels that are no whole vectors."""
    inputs, statistics = projection_inputs(5, cls, grid, channels)
    operator = branches.ConvProjections(built, stride, 1e-5, 1e-5)
    flags = Tensor(np.array(learns, np.float32))

    def run(x, *tensors):
        return operator(x, (*tensors, *statistics), flags, *grid)

    pairs = list(zip(statistics[:3], statistics[3:]))
    plain = plain_projections(
        (1, stride, stride), grid, [None if learns[i] else pairs[i] for i in range(3)]
    )
    compare(
        lambda *given: joined(run(*given)[:3]), lambda *given: joined(plain(*given)), *inputs,
        tolerance=5e-5, least=6,
    )  # fmt: skip
    tensors = list(map(Tensor, inputs))
    means, variances = run(*tensors)[3:6], run(*tensors)[6:]
    for i in range(3):
        x = layer_norm(*tensors[:3])
        _, mean, variance = plain_projection(x, *tensors[3 + i :: 3], stride if i else 1, grid)
        expected = (mean, variance) if learns[i] else pairs[i]
        np.testing.assert_allclose(means[i].asnumpy(), expected[0].asnumpy(), atol=1e-5)
        np.testing.assert_allclose(variances[i].asnumpy(), expected[1].asnumpy(), rtol=1e-4)


@pytest.mark.parametrize(("batch", "cls"), [(1, 0), (2, 1), (9, 1)])
def test_projections_with_statistics_that_stand_still(built, batch, cls):
    """In an evaluation; in training behind a frozen part the gradient passes through them."""
    inputs, statistics = projection_inputs(batch, cls, (9, 5), 8)
    operator = branches.ConvProjections(built, 2, 1e-5, 1e-5)
    plain = plain_projections((1, 2, 2), (9, 5), list(zip(statistics[:3], statistics[3:])))

    def run(x, *tensors):
        return joined(operator.with_statistics(x, (*tensors, *statistics), 9, 5))

    compare(run, lambda *given: joined(plain(*given)), *inputs, tolerance=2e-5)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "height", "width", "channels"),
    [(7, 4, 2, 16, 12, 4), (3, 2, 1, 25, 16, 33), (4, 4, 0, 8, 8, 5), (5, 2, 2, 9, 1, 16)],
)
def test_embedding(built, size, stride, padding, height, width, channels):
    operator = branches.ConvEmbed(built, size, stride, padding, 1e-5)

    def plain(x, weight, bias, gamma, beta):
        maps = x.transpose((0, 2, 1)).reshape((2, 3, height, width))
        y = ops.conv2d(maps, weight, stride=stride, pad_mode="pad", padding=padding)
        y = y.reshape((2, channels, -1)).transpose((0, 2, 1))
        return layer_norm(y + bias, gamma, beta)

    compare(
        lambda *given: operator(*given, height, width), plain,
        normal(2, height * width, 3), normal(channels, 3, size, size), normal(channels),
        1 + normal(channels, seed=1), normal(channels, seed=2), tolerance=3e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "hidden"), [(2, 7, 6, 10), (2, 150, 16, 32), (9, 30, 24, 33)]
)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_mlp_branch(built, batch, tokens, channels, hidden, activation):
    """With drop path that drops the first image; rows beyond a tile and several parts."""
    keep = Tensor(np.array([0.0] + [2.0] * (batch - 1), np.float32))
    act = {"quick_gelu": lambda x: x * ops.sigmoid(1.702 * x), "gelu": nn.GELU(False)}[activation]
    operator = branches.MlpBranch(built, activation, 1e-5)

    def plain(x, gamma, beta, up, of_up, down, of_down):
        y = act(ops.matmul(layer_norm(x, gamma, beta), up.T) + of_up)
        return x + keep.reshape((-1, 1, 1)) * (ops.matmul(y, down.T) + of_down)

    compare(
        lambda *given: operator(*given, keep), plain,
        normal(batch, tokens, channels), 1 + normal(channels), normal(channels, seed=1),
        normal(hidden, channels), normal(hidden), normal(channels, hidden),
        normal(channels, seed=2),
        tolerance=3e-5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "width"),
    [(2, 7, 3, 1, 16), (3, 1, 5, 3, 16), (9, 70, 17, 2, 32), (1, 150, 1100, 1, 16)],
)
def test_attention_branch(built, batch, queries, keys, heads, width):
    """One query is that of the class token alone; 1,100 keys make the tiles smaller."""
    channels = heads * width
    keep = Tensor(np.array([0.5] + [2.0] * (batch - 1), np.float32))
    operator = branches.AttentionBranch(built, heads, 0.1)
    attention = plain_attention(heads, 0.1)

    def run(x, q, k, v, *linears):
        return operator(x, (q, k, v), linears, keep)

    def plain(x, q, k, v, wq, wk, wv, w, bq, bk, bv, b):
        linear = ops.matmul
        mixed = attention(linear(q, wq.T), linear(k, wk.T), linear(v, wv.T), bq, bk, bv)
        return x + keep.reshape((-1, 1, 1)) * (linear(mixed, w.T) + b)

    weights = [0.3 * normal(channels, channels, seed=i) for i in range(4)]
    compare(
        run, plain,
        normal(batch, queries, channels), normal(batch, queries, channels, seed=1),
        normal(batch, keys, channels, seed=2), normal(batch, keys, channels, seed=3),
        *weights, *(normal(channels, seed=i) for i in range(4)), tolerance=3e-5, least=10,
    )  # fmt: skip


def test_results_do_not_depend_on_the_number_of_threads(built):
    """Outputs and gradients of one thread equal those of three, to the bit."""
    embed = branches.ConvEmbed(built, 3, 2, 1, 1e-5)
    project = branches.ConvProjections(built, 2, 1e-5, 1e-5)
    attend, mlp = branches.AttentionBranch(built, 2, 0.2), branches.MlpBranch(built, "gelu", 1e-5)
    keep, learns = Tensor(normal(5)), Tensor(np.ones(3, np.float32))
    shapes = [(5, 32 * 24, 3), (32, 3, 3, 3), *[(32,)] * 5, *[(32, 1, 3, 3)] * 3, *[(32,)] * 6]
    shapes += [*[(32, 32)] * 4, *[(32,)] * 4, (32,), (32,), (64, 32), (64,), (32, 64), (32,)]
    tensors = [Tensor(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]

    def run(*given):
        x = embed(*given[:5], 32, 24)
        statistics = (given[5],) * 6
        q, k, v = project(x, (*given[5:16], *statistics), learns, 16, 12)[:3]
        return mlp(attend(x, (q, k, v), given[16:24], keep), *given[24:], keep)

    found = []
    for threads in (1, 3):
        set_threads(threads)
        values = ms.grad(lambda *given: (run(*given) ** 3).sum(), tuple(range(len(tensors))))(
            *tensors
        )
        found.append([each.asnumpy().tobytes() for each in (run(*tensors), *values)])
    set_threads(None)
    assert found[0] == found[1]


def test_a_stride_beyond_the_grid_takes_little_memory(built):
    """It reaches the operator as the shape of a tensor."""
    assert branches.ConvProjections(built, 65536, 1e-5, 1e-5).stride.shape == (65536,)


def test_shapes_that_do_not_belong_together_raise(built):
    """A grid that the tokens do not fill; without the check the operator reads beyond them."""
    inputs, statistics = projection_inputs(1, 0, (4, 5), 8)
    x, *tensors = map(Tensor, inputs)
    operator = branches.ConvProjections(built, 2, 1e-5, 1e-5)
    with pytest.raises(Exception, match="(?i)projections|custom|launch"):
        operator.with_statistics(x, (*tensors, *statistics), 4, 4)[0].asnumpy()
