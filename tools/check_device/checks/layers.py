"""Compares each layer, forward and backward, with NumPy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from src.models.attention import ScaledDotProductAttention
from src.models.depthwise import ShiftedDepthwise
from src.models.layers import BatchNorm2d, FrontToken, LayerNorm, QuickGELU, conv2d
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from tools.check_device import reference
from tools.check_device.checks.cells import build_step, fill, noise, run_forward_backward
from tools.check_device.compare import by_largest, by_norm, check_limits
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting


def _compare(
    cell: nn.Cell,
    dy: np.ndarray,
    inputs: Sequence[np.ndarray],
    parameters: Sequence[Parameter],
    expected: Sequence[np.ndarray],
    gradients: str,
    name: str = "",
) -> dict[str, tuple[float, float]]:
    """Run a cell forward and backward; return difference and limit for each result, by name.

    Args:
        cell, dy, inputs, parameters: as in `run_forward_backward`.
        expected: the output and the gradients of inputs and parameters.
        gradients: names of the gradients.
        name: prefix of the names.
    """
    y, found = run_forward_backward(cell, dy, *inputs, parameters=parameters)
    result = {f"{name}output": (by_largest(y, expected[0]), limit("logits"))}
    for what, gradient, right in zip(gradients.split(), found, expected[1:]):
        result[f"{name}{what} gradient"] = by_norm(gradient, right), limit("gradients")
    return result


def _check_limits(results: dict[str, tuple[float, float]]) -> Finding:
    differences, limits = ({name: pair[i] for name, pair in results.items()} for i in (0, 1))
    return check_limits(differences, limits)


class _Depthwise(nn.Cell):
    """A depthwise convolution with its weight, on [B, H, W, C], in one of its two forms."""

    def __init__(self, weight: np.ndarray, stride: int, form: str) -> None:
        super().__init__()
        dim = len(weight)
        self.conv = conv2d(dim, dim, 3, stride=stride, padding=1, group=dim, has_bias=False)
        fill(self.conv.weight, weight)
        self.shifts = ShiftedDepthwise(stride) if form == "shifts" else None

    def construct(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H', W', C]."""
        if self.shifts is not None:
            return self.shifts(x, self.conv.weight)
        return self.conv(x.transpose((0, 3, 1, 2))).transpose((0, 2, 3, 1))


def depthwise(setting: Setting) -> Finding:
    """Check both forms with stride 1 and 2."""
    x, weight, results = noise(2, 14, 14, 32), noise(32, 1, 3, 3) / 3, {}
    for form, stride in itertools.product(("conv", "shifts"), (1, 2)):
        dy = noise(2, 14 // stride, 14 // stride, 32)
        cell = _Depthwise(weight, stride, form)
        expected = reference.depthwise(x, weight, dy, stride)
        name = f"{form}, stride {stride}: "
        results |= _compare(cell, dy, [x], [cell.conv.weight], expected, "input weight", name)
    return _check_limits(results)


def token_embedding(setting: Setting) -> Finding:
    """Check the strided convolutions of the first and of the later embeddings."""
    results = {}
    for channels, dim, size, stride, padding in ((3, 32, 7, 4, 2), (32, 48, 3, 2, 1)):
        x = noise(2, channels, 32, 32)
        edge = (32 + 2 * padding - size) // stride + 1
        dy = noise(2, dim, edge, edge)
        cell = conv2d(channels, dim, size, stride=stride, padding=padding, has_bias=True)
        weight = fill(cell.weight, noise(dim, channels, size, size) / (size * channels**0.5))
        bias = fill(cell.bias, noise(dim))
        expected = reference.convolution(x, weight, bias, dy, stride, padding)
        parameters, name = [cell.weight, cell.bias], f"{size} x {size}: "
        results |= _compare(cell, dy, [x], parameters, expected, "input weight bias", name)
    return _check_limits(results)


def batch_norm(setting: Setting) -> Finding:
    """Check training mode with its running statistics, on maps and on rows."""
    maps, results = noise(4, 32, 7, 7) * 3 + 1, {}  # [B, C, H, W]
    rows = np.ascontiguousarray(maps.transpose(0, 2, 3, 1).reshape(-1, 32))  # [R, C]
    count = len(rows)
    for name, x, axes in (("maps: ", maps, (0, 2, 3)), ("rows: ", rows, (0,))):
        dy, cell = noise(*x.shape, seed=1), BatchNorm2d(32).set_train(True)
        gamma, beta = fill(cell.gamma, 1 + 0.1 * noise(32)), fill(cell.beta, noise(32))
        *expected, mean, variance = reference.normalise(x, gamma, beta, dy, axes, axes)
        parameters = [cell.gamma, cell.beta]
        results |= _compare(cell, dy, [x], parameters, expected, "input gamma beta", name)
        running = 0.9 + 0.1 * variance.ravel() * count / (count - 1)
        for what, parameter, right in (
            ("mean", cell.moving_mean, 0.1 * mean.ravel()),
            ("variance", cell.moving_variance, running),
        ):
            difference = by_largest(parameter.asnumpy(), right)
            results[f"{name}running {what}"] = difference, limit("logits")
    return _check_limits(results)


def layer_norm(setting: Setting) -> Finding:
    """Check LayerNorm over the channels."""
    x, dy, cell = noise(2, 50, 64) * 3 + 1, noise(2, 50, 64, seed=1), LayerNorm(64)
    gamma, beta = fill(cell.gamma, 1 + 0.1 * noise(64)), fill(cell.beta, noise(64))
    *expected, _, _ = reference.normalise(x, gamma, beta, dy, (2,), (0, 1))
    return _check_limits(
        _compare(cell, dy, [x], [cell.gamma, cell.beta], expected, "input gamma beta")
    )


def attention(setting: Setting) -> Finding:
    """Check the product of queries, keys and values with its softmax."""
    q, k, v, dy = (noise(2, 3, t, 16, seed=i) for i, t in enumerate((50, 17, 17, 50)))
    cell = ScaledDotProductAttention(3, 16, 48**-0.5)
    expected = reference.attention(q, k, v, dy, 48**-0.5)
    return _check_limits(_compare(cell, dy, [q, k, v], [], expected, "query key value"))


class _Split(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.front_token = FrontToken()

    def construct(self, x: Tensor) -> Tensor:
        """Double the class token."""
        front, rest = self.front_token(x)
        return ops.cat((2.0 * front, rest), 1)


def class_token(setting: Setting) -> Finding:
    """Check splitting off the class token and putting it back: exact."""
    x, dy = noise(2, 50, 64), noise(2, 50, 64, seed=1)
    y, found = run_forward_backward(_Split(), dy, x)
    factor = np.where(np.arange(50) == 0, 2, 1)[:, None]
    return check_limits(
        {"output": by_largest(y, x * factor), "gradient": by_largest(found[0], dy * factor)}, 0.0
    )


def quick_gelu(setting: Setting) -> Finding:
    """Check the activation, far into both tails."""
    x, dy = 5 * noise(64, 64), noise(64, 64, seed=1)
    return _check_limits(_compare(QuickGELU(), dy, [x], [], reference.quick_gelu(x, dy), "input"))


class _Loss(nn.Cell):
    def __init__(self, labels: np.ndarray) -> None:
        super().__init__()
        self.loss = LabelSmoothingCrossEntropy(0.1)
        self.labels = Tensor(labels)

    def construct(self, logits: Tensor) -> Tensor:
        """[B, C] -> [1]."""
        return self.loss(logits, self.labels).reshape((1,))


def loss(setting: Setting) -> Finding:
    """Check cross entropy with label smoothing."""
    logits = 4 * noise(16, 100)
    labels = np.random.default_rng(0).integers(0, 100, 16).astype(np.int32)
    targets = reference.smooth_targets(labels, 100, 0.1)
    value, gradient = reference.cross_entropy(logits, targets)
    expected = [np.array([value]), gradient]
    dy = np.ones(1, np.float32)
    return _check_limits(_compare(_Loss(labels), dy, [logits], [], expected, "logits"))


class _Linear(nn.Cell):
    """A weight with decay and a bias without; their gradients are the inputs."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(weight), name="linear.weight")
        self.bias = Parameter(Tensor(bias), name="linear.bias")

    def construct(self, images: Tensor, keys: Tensor) -> Tensor:
        """images [2, n] -> scalar."""
        return (self.weight * images[0]).sum() + (self.bias * images[1]).sum()


class _Identity(nn.Cell):
    def construct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the network's output as the loss."""
        return outputs


ADAMW_STEPS, ADAMW_LR, ADAMW_DECAY, ADAMW_EPS = 5, 1e-2, 0.1, 1e-8


def adamw(setting: Setting) -> Finding:
    """Check five steps; half of the gradients are so small that epsilon matters."""
    net = _Linear(noise(64), noise(64, seed=1))
    start = [net.weight.asnumpy().copy(), net.bias.asnumpy().copy()]
    optimizer = AdamW(net.trainable_params(), (0.9, 0.999), ADAMW_EPS, ADAMW_DECAY)
    step = build_step(net, ADAMW_LR, ADAMW_STEPS, optimizer, _Identity())
    sizes = np.where(np.arange(64) % 2, 1e-8, 1.0)
    gradients = [(noise(2, 64, seed=i) * sizes).astype(np.float32) for i in range(ADAMW_STEPS)]
    for gradient in gradients:
        step.run_batch(Tensor(gradient), Tensor(np.zeros(2, np.int32)))
    differences = {}
    decays = (("weight", net.weight, ADAMW_DECAY), ("bias", net.bias, 0.0))
    for row, (name, parameter, decay) in enumerate(decays):
        own = [gradient[row].astype(np.float64) for gradient in gradients]
        expected = reference.adamw(start[row], own, ADAMW_LR, decay, (0.9, 0.999), ADAMW_EPS)
        # Relative to the update, which is much smaller than the weights.
        moved = parameter.asnumpy().astype(np.float64) - start[row]
        for what, part in (("ordinary", np.s_[::2]), ("tiny", np.s_[1::2])):
            right = (expected - start[row])[part]
            differences[f"{name}, {what} gradients"] = by_largest(moved[part], right)
    return check_limits(differences, 1e-4)  # float32 weights resolve an update no better
