"""Cells for the compiled operators that are a whole embedding, projection or branch of a block.

Each launches one operator, and one or two for its gradients. Names of shapes as in
`src.kernels.functions`. Generators and unpacked tuples in a gradient cost MindSpore's compiler
80 MB for six blocks, so there are few.
"""

from __future__ import annotations

import math
from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.kernels.functions import count_windows
from src.kernels.operator import KEPT_SIZE, integers, kept_and_recomputed, operator


class ConvEmbed(nn.Cell):
    """A convolution on tokens, then LayerNorm: the token embedding of few channels."""

    def __init__(
        self, library: Path, kernel_size: int, stride: int, padding: int, eps: float
    ) -> None:
        super().__init__()
        backward = operator(
            library,
            "conv_embed_grad",
            lambda dy, z, x, weight, gamma, *_: (z, weight, gamma, gamma, gamma),
            outputs=5,
        )
        backward_x = operator(library, "conv_embed_grad_x", lambda dz, x, *_: x)

        def bprop(x, weight, bias, gamma, beta, eps, sizes, grid, out, dout):
            found = backward(dout[0], out[1], x, weight, gamma, eps, sizes, grid)
            dx = backward_x(found[0], x, weight, sizes, grid)
            zeros = (ops.zeros_like(eps), ops.zeros_like(sizes), ops.zeros_like(grid))
            return (dx, found[1], found[2], found[3], found[4], *zeros)

        def shapes(x, weight, bias, gamma, beta, eps, sizes, grid):
            y = [x[0], count_windows(sizes, grid), weight[0]]
            return y, y

        self.forward = operator(library, "conv_embed", shapes, bprop, 2)
        self.eps = Tensor([eps], mstype.float32)
        self.sizes = integers(kernel_size, stride, padding + 1)

    def construct(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        height: int,
        width: int,
    ) -> Tensor:
        """Embed tokens.

        Args:
            x: [B, H * W, C] on a grid of height x width.
            weight: [C', C, k, k].
            bias, gamma, beta: [C'].

        Returns:
            [B, N, C'] on the strided grid.
        """
        grid = ops.zeros((height, width), mstype.float32)
        return self.forward(x, weight, bias, gamma, beta, self.eps, self.sizes, grid)[0]


class ConvProjections(nn.Cell):
    """LayerNorm, then the convolutions and BatchNorms of queries, keys and values.

    The class token takes LayerNorm only.

    Args:
        kv_stride: stride of the keys' and values' depthwise 3x3 convolution; the queries' is 1.
        layer_norm_eps, batch_norm_eps: of the norms.
    """

    def __init__(
        self, library: Path, kv_stride: int, layer_norm_eps: float, batch_norm_eps: float
    ) -> None:
        super().__init__()

        def grids(x, *rest):
            stride, grid = rest[-2:]
            cls = x[1] - grid[0] * grid[1]
            counts = [
                math.prod((edge - 1) // step + 1 for edge in grid) for step in (1, *stride * 2)
            ]
            return tuple([x[0], cls + count, x[2]] for count in counts)

        def shapes(x, gamma, *rest):
            return (*grids(x, *rest), *(gamma,) * 6)

        def gradients(dq, dk, dv, x, gamma, beta, wq, wk, wv, *_):
            return (x, gamma, gamma, wq, wk, wv, *(gamma,) * 6)

        backward = operator(library, "batch_projections_grad", gradients, outputs=12)

        def bprop(
            x, gamma, beta, wq, wk, wv, gq, gk, gv, bq, bk, bv, mq, mk, mv, vq, vk, vv,
            eps, learns, stride, grid, out, dout,
        ):  # fmt: skip
            found = backward(
                dout[0], dout[1], dout[2], x, gamma, beta, wq, wk, wv, gq, gk, gv,
                out[3], out[4], out[5], out[6], out[7], out[8],
                eps, learns, stride, grid,
            )  # fmt: skip
            zeros, of_learns = ops.zeros_like(mq), ops.zeros_like(learns)
            of_others = (ops.zeros_like(eps), of_learns, ops.zeros_like(stride))
            return (*found, *(zeros,) * 6, *of_others, ops.zeros_like(grid))

        self.kept, self.recomputed = kept_and_recomputed(
            library, "batch_projections", shapes, bprop, 9
        )

        def fixed_bprop(
            x, gamma, beta, wq, wk, wv, gq, gk, gv, bq, bk, bv, mq, mk, mv, vq, vk, vv,
            eps, stride, grid, out, dout,
        ):  # fmt: skip
            learns = ops.zeros((3,), mstype.float32)
            vectors = (x, gamma, beta, wq, wk, wv, gq, gk, gv, bq, bk, bv, mq, mk, mv, vq, vk, vv)
            found = backward(*dout, *vectors[:9], *vectors[12:], eps, learns, stride, grid)
            of_others = (ops.zeros_like(eps), ops.zeros_like(stride), ops.zeros_like(grid))
            return (*found, *(ops.zeros_like(mq),) * 6, *of_others)

        self.fixed = operator(library, "projections", grids, fixed_bprop, 3)
        self.eps = Tensor([layer_norm_eps, batch_norm_eps], mstype.float32)
        self.stride = integers(kv_stride)

    def construct(
        self, x: Tensor, tensors: tuple[Tensor, ...], learns: Tensor, height: int, width: int
    ) -> tuple[Tensor, ...]:
        """Normalise by the batch's statistics.

        Args:
            x: [B, T, C] on a grid of height x width.
            tensors: LayerNorm's gamma and beta [C], then of queries, keys and values each the
                weights [C, 1, 3, 3], BatchNorm's gammas, betas, means and variances [C].
            learns: float32 [3]; where it is 0, the given mean and variance are used.

        Returns:
            Three tensors of tokens [B, T', C] on the strided grids, three means [C] and three
            biased variances [C], by which they were normalised.
        """
        grid = ops.zeros((height, width), mstype.float32)
        forward = self.kept if x.size <= KEPT_SIZE else self.recomputed
        return forward(x, *tensors, self.eps, learns, self.stride, grid)

    def with_statistics(
        self, x: Tensor, tensors: tuple[Tensor, ...], height: int, width: int
    ) -> tuple[Tensor, ...]:
        """Normalise by the given means and variances, for inference and frozen parts."""
        grid = ops.zeros((height, width), mstype.float32)
        return self.fixed(x, *tensors, self.eps, self.stride, grid)


class AttentionBranch(nn.Cell):
    """x + keep * attention: the first branch of a block, behind its projections, for few channels.

    Nothing between the projections and the result is kept; the backward pass computes it again.

    Args:
        library: path of the library.
        num_heads: of 16, 32, ... channels each.
        scale: factor on the scores.
    """

    def __init__(self, library: Path, num_heads: int, scale: float) -> None:
        super().__init__()

        def shapes(dy, x, q, k, v, wq, wk, wv, w, bq, bk, bv, b, *_):
            return q, k, v, wq, wk, wv, w, bq, bk, bv, b

        backward = operator(library, "attention_branch_grad", shapes, outputs=11)

        def bprop(x, q, k, v, wq, wk, wv, w, bq, bk, bv, b, keep, scale, heads, out, dout):
            found = backward(dout, x, q, k, v, wq, wk, wv, w, bq, bk, bv, b, keep, scale, heads)
            zeros = (ops.zeros_like(keep), ops.zeros_like(scale), ops.zeros_like(heads))
            return (dout, *found, *zeros)

        self.forward = operator(library, "attention_branch", lambda x, *_: x, bprop)
        self.scale = Tensor([scale], mstype.float32)
        self.heads = integers(num_heads)

    def construct(
        self, x: Tensor, projected: tuple[Tensor, ...], linears: tuple[Tensor, ...], keep: Tensor
    ) -> Tensor:
        """Compute a branch.

        Args:
            x: [B, T, C].
            projected: queries [B, T, C], keys and values [B, T', C], before their Linears.
            linears: weights [C, C] of queries, keys, values and the result; then biases [C].
            keep: drop path's factors [B].

        Returns:
            [B, T, C].
        """
        return self.forward(x, *projected, *linears, keep, self.scale, self.heads)


class MlpBranch(nn.Cell):
    """x + keep * MLP(LayerNorm(x)): the second branch of a block, for few channels.

    Nothing between x and the result is kept; the backward pass computes it again.

    Args:
        library: path of the library.
        activation: as in `BiasActivation`.
        eps: of LayerNorm.
    """

    def __init__(self, library: Path, activation: str, eps: float) -> None:
        super().__init__()
        name = f"mlp_{activation}"

        def shapes(dy, x, gamma, beta, up, of_up, down, of_down, *_):
            return x, gamma, beta, up, of_up, down, of_down

        backward = operator(library, f"{name}_grad", shapes, outputs=7)

        def bprop(x, gamma, beta, up, of_up, down, of_down, keep, eps, out, dout):
            found = backward(dout, x, gamma, beta, up, of_up, down, of_down, keep, eps)
            return (*found, ops.zeros_like(keep), ops.zeros_like(eps))

        self.forward = operator(library, name, lambda x, *_: x, bprop)
        self.eps = Tensor([eps], mstype.float32)

    def construct(
        self,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        up: Tensor,
        of_up: Tensor,
        down: Tensor,
        of_down: Tensor,
        keep: Tensor,
    ) -> Tensor:
        """Compute a branch.

        Args:
            x: [B, T, C].
            gamma, beta: LayerNorm's, [C].
            up, of_up: weight [H, C] and bias [H] of the first Linear.
            down, of_down: weight [C, H] and bias [C] of the second.
            keep: drop path's factors [B].

        Returns:
            [B, T, C].
        """
        return self.forward(x, gamma, beta, up, of_up, down, of_down, keep, self.eps)
