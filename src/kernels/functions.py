"""Cells for the compiled operators of single layers and of attention, on float32 tensors.

Shapes: B batch, H x W the token grid, T tokens (class token first where there is one, so T = H * W
or 1 + H * W), C channels. The arithmetic is in `src/kernels/cpp`; `library` is the path that
`src.kernels.library` returns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.kernels.operator import KEPT_SIZE, integers, kept_and_recomputed, operator


class LayerNorm(nn.Cell):
    """LayerNorm over the last axis."""

    def __init__(self, library: Path, eps: float) -> None:
        super().__init__()
        backward = operator(
            library, "layer_norm_grad", lambda dy, x, gamma, *_: (x, gamma, gamma), outputs=3
        )

        def bprop(x, gamma, beta, eps, out, dout):
            return (*backward(dout[0], x, gamma, out[1], out[2]), ops.zeros_like(eps))

        def shapes(x, *_):
            rows = [math.prod(x[:-1])]
            return x, rows, rows

        self.kept, self.recomputed = kept_and_recomputed(library, "layer_norm", shapes, bprop, 3)
        self.eps = Tensor([eps], mstype.float32)

    def construct(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """x [..., C], gamma and beta [C] -> [..., C]."""
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, gamma, beta, self.eps)[0]


class Attention(nn.Cell):
    """Scaled dot-product attention in every head, with the biases of queries, keys and values.

    The scores are not kept; the backward pass computes them again.
    """

    def __init__(self, library: Path, num_heads: int, scale: float) -> None:
        super().__init__()
        backward = operator(
            library,
            "attention_grad",
            lambda dy, q, k, v, of_q, of_k, of_v, *_: (q, k, v, of_q, of_k, of_v),
            outputs=6,
        )

        def bprop(q, k, v, of_q, of_k, of_v, scale, heads, out, dout):
            gradients = backward(dout, q, k, v, of_q, of_k, of_v, scale, heads)
            return (*gradients, ops.zeros_like(scale), ops.zeros_like(heads))

        self.forward = operator(library, "attention", lambda q, *_: q, bprop)
        self.scale = Tensor([scale], mstype.float32)
        self.heads = integers(num_heads)

    def construct(
        self, q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor
    ) -> Tensor:
        """q [B, T, C], k and v [B, T', C], their biases [C] -> [B, T, C], head after head."""
        return self.forward(q, k, v, of_q, of_k, of_v, self.scale, self.heads)


class BiasActivation(nn.Cell):
    """activation(x + bias).

    Args:
        library: path of the library.
        activation: "quick_gelu" or "gelu" (exact, with erf).
    """

    def __init__(self, library: Path, activation: str) -> None:
        super().__init__()
        name = f"bias_{activation}"
        backward = operator(library, f"{name}_grad", lambda dy, x, bias: (x, bias), outputs=2)

        def bprop(x, bias, out, dout):
            return backward(dout, x, bias)

        self.kept, self.recomputed = kept_and_recomputed(library, name, lambda x, bias: x, bprop)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [M, C], bias [C] -> [M, C]."""
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, bias)


class BiasResidual(nn.Cell):
    """x + keep * (z + bias): the end of a residual branch with drop path."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        backward = operator(
            library, "bias_residual_grad", lambda dy, keep: (dy, [dy[2]]), outputs=2
        )

        def bprop(x, z, bias, keep, out, dout):
            dz, dbias = backward(dout, keep)
            return dout, dz, dbias, ops.zeros_like(keep)

        self.forward = operator(library, "bias_residual", lambda x, *_: x, bprop)

    def construct(self, x: Tensor, z: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        """x and z [B, T, C], bias [C], keep [B] -> [B, T, C]."""
        return self.forward(x, z, bias, keep)


def count_windows(sizes: Sequence[int], grid: Sequence[int]) -> int:
    """Return how many windows a convolution has on a grid.

    Args:
        sizes: kernel size, stride, padding + 1.
        grid: height and width.
    """
    size, stride, margin = sizes
    return math.prod((edge + 2 * (margin - 1) - size) // stride + 1 for edge in grid)


class Unfold(nn.Cell):
    """The windows of a k x k convolution as rows of a matrix."""

    def __init__(self, library: Path, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        backward = operator(library, "unfold_grad", lambda dy, sizes, grid, x: x)

        def bprop(x, sizes, grid, out, dout):
            return backward(dout, sizes, grid, x), ops.zeros_like(sizes), ops.zeros_like(grid)

        def shape(x, sizes, grid):
            return [x[0] * count_windows(sizes, grid), sizes[0] ** 2 * x[2]]

        self.kept, self.recomputed = kept_and_recomputed(library, "unfold", shape, bprop)
        self.sizes = integers(kernel_size, stride, padding + 1)

    def construct(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, H * W, C] -> [B * N, k * k * C], a row's values by row, column, channel."""
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, self.sizes, ops.zeros((height, width), mstype.float32))
