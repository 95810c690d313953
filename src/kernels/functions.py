"""Cells for the compiled operators and their gradients, on float32 tensors.

Shapes: B batch, H x W the token grid, T tokens (class token first where there is one, so T = H * W
or 1 + H * W), C channels, h heads. The arithmetic is in `src/kernels/cpp`; `library` is the path
that `src.kernels.library` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

# Elements of an input (2 MiB) up to which a training step keeps the output: launching the operator
# again would cost more time than the memory is worth. Outputs of larger inputs are computed again.
KEPT_SIZE = 2**19


def _operator(
    library: Path,
    name: str,
    shapes: Callable,
    bprop: Callable | None = None,
    outputs: int = 1,
    recompute: bool = False,
) -> ops.Custom:
    """Create an operator from a function of the library.

    Args:
        shapes: maps the inputs' shapes to the output's, or to a tuple for several outputs. Like
            `bprop` it must not depend on the cell: MindSpore identifies operators by their name.
        recompute: whether a training step in graph mode computes the outputs again in the backward
            pass instead of keeping them.
    """

    def types(*given):
        for each in given:
            if each.element_type() != mstype.float32:  # its bytes would be read as float32
                raise TypeError(f"the compiled operators take float32, not {each}")
        return mstype.float32 if outputs == 1 else (mstype.float32,) * outputs

    made = ops.Custom(f"{library}:{name}", shapes, types, func_type="aot", bprop=bprop)
    return made.add_prim_attr("recompute", recompute)


def _kept_and_recomputed(*args) -> tuple[ops.Custom, ops.Custom]:
    """Create an operator whose outputs are cheap twice: for small inputs and for large ones."""
    return _operator(*args), _operator(*args, recompute=True)


def _sizes(*numbers: int) -> Tensor:
    """Pass integers to an operator as the shape of a tensor; each must be 1 or more."""
    return Tensor(np.zeros(numbers, np.float32))


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis."""

    def __init__(self, library: Path, eps: float) -> None:
        super().__init__()
        backward = _operator(
            library, "layer_norm_grad", lambda dy, x, gamma, *_: (x, gamma, gamma), outputs=3
        )

        def bprop(x, gamma, beta, eps, out, dout):
            return (*backward(dout[0], x, gamma, out[1], out[2]), ops.zeros_like(eps))

        def shapes(x, *_):
            rows = [math.prod(x[:-1])]
            return x, rows, rows

        self.kept, self.recomputed = _kept_and_recomputed(library, "layer_norm", shapes, bprop, 3)
        self.eps = Tensor([eps], mstype.float32)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """x [..., C], gamma and beta [C] -> [..., C]."""
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, gamma, beta, self.eps)[0]


class Softmax(nn.Cell):
    """softmax(scale * x) over the last axis."""

    def __init__(self, library: Path, scale: float) -> None:
        super().__init__()
        backward = _operator(library, "softmax_grad", lambda dy, *_: dy)

        def bprop(x, scale, out, dout):
            return backward(dout, out, scale), ops.zeros_like(scale)

        self.forward = _operator(library, "softmax", lambda x, *_: x, bprop)
        self.scale = Tensor([scale], mstype.float32)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.forward(x, self.scale)


class ConvNorm(nn.Cell):
    """Depthwise 3x3 convolution with padding 1, then BatchNorm; the class token bypasses both."""

    def __init__(self, library: Path, stride: int, eps: float) -> None:
        super().__init__()
        backward = _operator(
            library,
            "conv_norm_grad",
            lambda dy, x, weight, z, mean, variance, gamma, *_: (x, weight, gamma, gamma),
            outputs=4,
        )

        def bprop(x, weight, gamma, beta, eps, stride, grid, out, dout):
            _, z, mean, variance = out
            gradients = backward(dout[0], x, weight, z, mean, variance, gamma, eps, stride, grid)
            return (*gradients, ops.zeros_like(eps), ops.zeros_like(stride), ops.zeros_like(grid))

        def shape(x, weight, *rest):
            strides, grid = rest[-2:]
            cls = x[1] - grid[0] * grid[1]
            after = cls + math.prod((edge - 1) // strides[0] + 1 for edge in grid)
            return [x[0], after, x[2]]

        def shapes(x, weight, gamma, beta, eps, strides, grid):
            y = shape(x, weight, strides, grid)
            return y, y, gamma, gamma

        self.kept, self.recomputed = _kept_and_recomputed(library, "conv_norm", shapes, bprop, 4)
        frozen_backward = _operator(
            library,
            "depthwise_grad",
            lambda dy, x, weight, scale, *_: (x, weight, scale, scale),
            outputs=4,
        )

        def frozen_bprop(x, weight, gamma, beta, mean, variance, eps, stride, grid, out, dout):
            inverse = ops.rsqrt(variance + eps)
            dx, dweight, dscale, dshift = frozen_backward(
                dout, x, weight, gamma * inverse, stride, grid
            )
            dgamma = (dscale - dshift * mean) * inverse
            others = (mean, variance, eps, stride, grid)  # the statistics are given
            return (dx, dweight, dgamma, dshift, *(ops.zeros_like(each) for each in others))

        self.frozen = _operator(library, "depthwise", shape, frozen_bprop)
        self.eps = Tensor([eps], mstype.float32)
        self.stride = _sizes(stride)

    def construct(
        self, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise by the batch's statistics.

        Args:
            x: [B, T, C] on a grid of height x width.
            weight: [C, 1, 3, 3].
            gamma, beta: [C].

        Returns:
            Tokens [B, T', C] of the strided grid, the batch's mean [C] and biased variance [C].
        """
        grid = ops.zeros((height, width), mstype.float32)
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        y, _, mean, variance = forward(x, weight, gamma, beta, self.eps, self.stride, grid)
        return y, mean, variance

    def with_statistics(
        self,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        variance: Tensor,
        height: int,
        width: int,
    ) -> Tensor:
        """Normalise by a given mean and variance [C], for inference and frozen parts."""
        grid = ops.zeros((height, width), mstype.float32)
        return self.frozen(x, weight, gamma, beta, mean, variance, self.eps, self.stride, grid)


class BiasActivation(nn.Cell):
    """activation(x + bias).

    Args:
        library: path of the library.
        activation: "quick_gelu" or "gelu" (exact, with erf).
    """

    def __init__(self, library: Path, activation: str) -> None:
        super().__init__()
        name = f"bias_{activation}"
        backward = _operator(library, f"{name}_grad", lambda dy, x, bias: (x, bias), outputs=2)

        def bprop(x, bias, out, dout):
            return backward(dout, x, bias)

        self.kept, self.recomputed = _kept_and_recomputed(library, name, lambda x, bias: x, bprop)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [M, C], bias [C] -> [M, C]."""
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, bias)


class SplitHeads(nn.Cell):
    """x + bias with its channels split over the heads."""

    def __init__(self, library: Path, num_heads: int) -> None:
        super().__init__()
        backward = _operator(library, "merge_heads", _merged, outputs=2)

        def bprop(x, bias, heads, out, dout):
            return (*backward(dout, heads), ops.zeros_like(heads))

        self.forward = _operator(library, "split_heads", _split, bprop)
        self.heads = _sizes(num_heads)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, T, C], bias [C] -> [B, h, T, C / h]."""
        return self.forward(x, bias, self.heads)


def _split(x, bias, heads):
    return [x[0], heads[0], x[1], x[2] // heads[0]]


def _merged(x, heads):
    channels = x[1] * x[3]
    return [x[0], x[2], channels], [channels]


class MergeHeads(nn.Cell):
    """Concatenates the heads' channels."""

    def __init__(self, library: Path, num_heads: int) -> None:
        super().__init__()
        backward = _operator(library, "split_heads", _split)

        def bprop(x, heads, out, dout):
            return backward(dout[0], ops.zeros_like(out[1]), heads), ops.zeros_like(heads)

        self.forward = _operator(library, "merge_heads", _merged, bprop, 2)
        self.heads = _sizes(num_heads)

    def construct(self, x: Tensor) -> Tensor:
        """x [B, h, T, C / h] -> [B, T, C]."""
        return self.forward(x, self.heads)[0]


class BiasResidual(nn.Cell):
    """x + keep * (z + bias): the end of a residual branch with drop path."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        backward = _operator(
            library, "bias_residual_grad", lambda dy, keep: (dy, [dy[2]]), outputs=2
        )

        def bprop(x, z, bias, keep, out, dout):
            dz, dbias = backward(dout, keep)
            return dout, dz, dbias, ops.zeros_like(keep)

        self.forward = _operator(library, "bias_residual", lambda x, *_: x, bprop)

    def construct(self, x: Tensor, z: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        """x and z [B, T, C], bias [C], keep [B] -> [B, T, C]."""
        return self.forward(x, z, bias, keep)


class Unfold(nn.Cell):
    """The windows of a k x k convolution as rows of a matrix."""

    def __init__(self, library: Path, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        backward = _operator(library, "unfold_grad", lambda dy, sizes, grid, x: x)

        def bprop(x, sizes, grid, out, dout):
            return backward(dout, sizes, grid, x), ops.zeros_like(sizes), ops.zeros_like(grid)

        def shape(x, sizes, grid):
            size, step, margin = sizes
            windows = [(edge + 2 * (margin - 1) - size) // step + 1 for edge in grid]
            return [x[0] * math.prod(windows), size**2 * x[2]]

        self.kept, self.recomputed = _kept_and_recomputed(library, "unfold", shape, bprop)
        self.sizes = _sizes(kernel_size, stride, padding + 1)

    def construct(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, H * W, C] -> [B * N, k * k * C], a row's values by row, column, channel."""
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, self.sizes, ops.zeros((height, width), mstype.float32))
