"""Layer by layer, forward and backward, against numpy in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from src.build import compiled_library
from src.config import RuntimeConfig
from src.models.attention import ScaledDotProductAttention
from src.models.depthwise import ShiftedDepthwise
from src.models.layers import BatchNorm2d, FrontToken, LayerNorm, QuickGELU, conv2d
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from src.training.train_step import TrainStep
from tools.check_device import reference
from tools.check_device.checks.cells import fill, noise, run_both_ways
from tools.check_device.compare import by_largest, by_norm, judge
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting

Pairs = Iterable[tuple[str, np.ndarray, np.ndarray]]  # name, found, expected


def _judge(outputs: Pairs, gradients: Pairs) -> Finding:
    differences = {name: by_largest(found, expected) for name, found, expected in outputs}
    limits = dict.fromkeys(differences, limit("logits"))
    slopes = {name: by_norm(found, expected) for name, found, expected in gradients}
    limits.update(dict.fromkeys(slopes, limit("gradients")))
    return judge({**differences, **slopes}, limits)


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
    """Both forms, stride 1 and 2."""
    outputs, gradients = [], []
    x, weight = noise(2, 14, 14, 32), noise(32, 1, 3, 3) / 3
    for form in ("conv", "shifts"):
        for stride in (1, 2):
            name, dy = f"{form}, stride {stride}", noise(2, 14 // stride, 14 // stride, 32)
            cell = _Depthwise(weight, stride, form)
            y, found = run_both_ways(cell, dy, x, parameters=[cell.conv.weight])
            expected = reference.depthwise(x, weight, dy, stride)
            outputs.append((f"{name}: output", y, expected[0]))
            gradients.append((f"{name}: input gradient", found[0], expected[1]))
            gradients.append((f"{name}: weight gradient", found[1], expected[2]))
    return _judge(outputs, gradients)


def token_embedding(setting: Setting) -> Finding:
    """The strided convolutions of the first and of the later embeddings."""
    outputs, gradients = [], []
    for channels, dim, size, stride, padding in ((3, 32, 7, 4, 2), (32, 48, 3, 2, 1)):
        name, x = f"{size} x {size}", noise(2, channels, 32, 32)
        edge = (32 + 2 * padding - size) // stride + 1
        dy = noise(2, dim, edge, edge)
        cell = conv2d(channels, dim, size, stride=stride, padding=padding, has_bias=True)
        weight = fill(cell.weight, noise(dim, channels, size, size) / (size * channels**0.5))
        bias = fill(cell.bias, noise(dim))
        y, found = run_both_ways(cell, dy, x, parameters=[cell.weight, cell.bias])
        expected = reference.convolution(x, weight, bias, dy, stride, padding)
        outputs.append((f"{name}: output", y, expected[0]))
        for what, value, right in zip(("input", "weight", "bias"), found, expected[1:]):
            gradients.append((f"{name}: {what} gradient", value, right))
    return _judge(outputs, gradients)


def _rows(x: np.ndarray) -> np.ndarray:
    """[B, C, H, W] -> [R, C]."""
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])


def batch_norm(setting: Setting) -> Finding:
    """Training with its running statistics, on maps and on rows."""
    outputs, gradients = [], []
    image = noise(4, 32, 7, 7) * 3 + 1
    for name, x in (("maps", image), ("rows", np.ascontiguousarray(_rows(image)))):
        dy, cell = noise(*x.shape, seed=1), BatchNorm2d(32)
        gamma, beta = fill(cell.gamma, 1 + 0.1 * noise(32)), fill(cell.beta, noise(32))
        cell.set_train(True)
        y, found = run_both_ways(cell, dy, x, parameters=[cell.gamma, cell.beta])
        flat = _rows if x.ndim == 4 else np.asarray
        expected = reference.normalise(flat(x), gamma, beta, flat(dy), 0)
        outputs.append((f"{name}: output", flat(y), expected[0]))
        count = expected[0].shape[0]
        moving = {
            "mean": (cell.moving_mean, 0.1 * expected[4][0]),
            "variance": (cell.moving_variance, 0.9 + 0.1 * expected[5][0] * count / (count - 1)),
        }
        for what, (parameter, right) in moving.items():
            outputs.append((f"{name}: running {what}", parameter.asnumpy(), right))
        gradients.append((f"{name}: input gradient", flat(found[0]), expected[1]))
        gradients.append((f"{name}: gamma gradient", found[1], expected[2]))
        gradients.append((f"{name}: beta gradient", found[2], expected[3]))
    return _judge(outputs, gradients)


def layer_norm(setting: Setting) -> Finding:
    """Over the channels."""
    x, dy, cell = noise(2, 50, 64) * 3 + 1, noise(2, 50, 64, seed=1), LayerNorm(64)
    gamma, beta = fill(cell.gamma, 1 + 0.1 * noise(64)), fill(cell.beta, noise(64))
    y, found = run_both_ways(cell, dy, x, parameters=[cell.gamma, cell.beta])
    expected = reference.normalise(x.reshape(-1, 64), gamma, beta, dy.reshape(-1, 64), -1)
    names = ("input gradient", "gamma gradient", "beta gradient")
    return _judge(
        [("output", y.reshape(-1, 64), expected[0])],
        zip(names, [found[0].reshape(-1, 64), *found[1:]], expected[1:4]),
    )


def attention(setting: Setting) -> Finding:
    """The product of queries, keys and values with its softmax."""
    q, k, v, dy = (noise(2, 3, t, 16, seed=i) for i, t in enumerate((50, 17, 17, 50)))
    y, found = run_both_ways(ScaledDotProductAttention(3, 16, 48**-0.5), dy, q, k, v)
    expected = reference.attention(q, k, v, dy, 48**-0.5)
    names = ("query gradient", "key gradient", "value gradient")
    return _judge([("output", y, expected[0])], zip(names, found, expected[1:]))


class _Split(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.take_front = FrontToken()

    def construct(self, x: Tensor) -> Tensor:
        """The tokens in their order, the class token doubled."""
        front, rest = self.take_front(x)
        return ops.cat((2.0 * front, rest), 1)


def class_token(setting: Setting) -> Finding:
    """Taking the class token off the others and putting it back: exact."""
    x, dy = noise(2, 50, 64), noise(2, 50, 64, seed=1)
    y, found = run_both_ways(_Split(), dy, x)
    factor = np.where(np.arange(50) == 0, 2, 1)[:, None]
    return judge(
        {"output": by_largest(y, x * factor), "gradient": by_largest(found[0], dy * factor)}, 0.0
    )


def quick_gelu(setting: Setting) -> Finding:
    """The activation, far into both its tails."""
    x, dy = 5 * noise(64, 64), noise(64, 64, seed=1)
    y, found = run_both_ways(QuickGELU(), dy, x)
    expected = reference.quick_gelu(x, dy)
    return _judge([("output", y, expected[0])], [("gradient", found[0], expected[1])])


class _Loss(nn.Cell):
    def __init__(self, labels: np.ndarray) -> None:
        super().__init__()
        self.loss = LabelSmoothingCrossEntropy(0.1)
        self.labels = Tensor(labels)

    def construct(self, logits: Tensor) -> Tensor:
        """[B, C] -> [1]."""
        return self.loss(logits, self.labels).reshape((1,))


def loss(setting: Setting) -> Finding:
    """Cross entropy with label smoothing."""
    logits = 4 * noise(16, 100)
    labels = np.random.default_rng(0).integers(0, 100, 16).astype(np.int32)
    y, found = run_both_ways(_Loss(labels), np.ones(1, np.float32), logits)
    targets = reference.smooth_targets(labels, 100, 0.1)
    expected = reference.cross_entropy(logits, targets)
    return _judge([("loss", y, [expected[0]])], [("gradient", found[0], expected[1])])


class _Linear(nn.Cell):
    """Its gradient is the input: a weight, which decays, and a bias, which does not."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(weight), name="linear.weight")
        self.bias = Parameter(Tensor(bias), name="linear.bias")

    def construct(self, images: Tensor, keys: Tensor) -> Tensor:
        """images [2, n] -> scalar."""
        return (self.weight * images[0]).sum() + (self.bias * images[1]).sum()


class _Identity(nn.Cell):
    def construct(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The network's output is the loss."""
        return outputs


ADAMW_STEPS, ADAMW_LR, ADAMW_DECAY, ADAMW_EPS = 5, 1e-2, 0.1, 1e-8


def adamw(setting: Setting) -> Finding:
    """Five steps; half of the gradients are so small that epsilon decides."""
    net = _Linear(noise(64), noise(64, seed=1))
    start = [net.weight.asnumpy().copy(), net.bias.asnumpy().copy()]
    optimizer = AdamW(net.trainable_params(), (0.9, 0.999), ADAMW_EPS, ADAMW_DECAY)
    rates = np.full(ADAMW_STEPS, ADAMW_LR, np.float32)
    library = compiled_library(RuntimeConfig())
    step = TrainStep(net, _Identity(), optimizer, rates, library=library).set_train(True)
    sizes = np.where(np.arange(64) % 2, 1e-8, 1.0)
    gradients = [(noise(2, 64, seed=i) * sizes).astype(np.float32) for i in range(ADAMW_STEPS)]
    for gradient in gradients:
        step.run_batch(Tensor(gradient), Tensor(np.zeros(2, np.int32)))
    differences = {}
    decays = (("weight", net.weight, ADAMW_DECAY), ("bias", net.bias, 0.0))
    for row, (name, parameter, decay) in enumerate(decays):
        own = [gradient[row].astype(np.float64) for gradient in gradients]
        expected = reference.adamw(start[row], own, ADAMW_LR, decay, (0.9, 0.999), ADAMW_EPS)
        # By the way that the weights went, which is much shorter than they are.
        moved = parameter.asnumpy().astype(np.float64) - start[row]
        for what, part in (("ordinary", np.s_[::2]), ("tiny", np.s_[1::2])):
            right = (expected - start[row])[part]
            differences[f"{name}, {what} gradients"] = by_largest(moved[part], right)
    return judge(differences, 1e-4)  # float32 weights keep no more of an update
