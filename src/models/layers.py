"""The parts of a CvT stage (Wu et al., ICCV 2021, section 3), after the official `cls_cvt.py`.

Shapes: B batch, C channels, H x W the token grid, N = H * W tokens, T = N or 1 + N with a class
token in front, h heads. Parameters have the official names, except for the norms' gamma, beta,
moving_mean and moving_variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeUniform, Normal, Uniform, initializer

from src.errors import UserError
from src.models.attention import ScaledDotProductAttention
from src.models.depthwise import KERNEL_SIZE, PADDING, ShiftedDepthwise
from src.models.stochastic import Dropout, DropPath


@dataclass(frozen=True)
class StageConfig:
    """Arguments of one stage; `src.models.cvt.CvT` documents them."""

    in_channels: int
    dim: int
    kernel_size: int
    stride: int
    padding: int
    depth: int
    num_heads: int
    mlp_ratio: float
    kv_stride: int
    qkv_projection: str
    cls_token: bool
    pos_embed_grid: tuple[int, int] | None
    drop_rate: float
    drop_path_rate: float


def trunc_normal() -> Normal:
    """Return the official initialiser: std .02, truncated at +-2, which has no effect."""
    return Normal(sigma=0.02)


def dense(in_channels: int, out_channels: int) -> nn.Dense:
    """Create a Linear with the official initialisation: weight trunc-normal, bias 0."""
    return nn.Dense(in_channels, out_channels, weight_init=trunc_normal(), bias_init="zeros")


def conv2d(in_channels: int, out_channels: int, kernel_size: int, **kwargs) -> nn.Conv2d:
    """Create a convolution with PyTorch's default initialisation, +-1 / sqrt(fan_in)."""
    fan_in = in_channels // kwargs.get("group", 1) * kernel_size**2
    return nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        pad_mode="pad",
        weight_init=HeUniform(negative_slope=math.sqrt(5)),
        bias_init=Uniform(1 / math.sqrt(fan_in)),
        **kwargs,
    )


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels in float32 at any precision; MindSpore's default eps is 1e-7."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__((dim,), epsilon=eps)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., C] -> float32 [..., C]."""
        return super().construct(x.astype(mstype.float32))


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm in float32 at any precision; momentum .9 is PyTorch's .1."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-5, momentum=0.9)

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> float32 [B, C, H, W]; rows [R, C] -> float32 [R, C]."""
        x = x.astype(mstype.float32)
        if x.ndim == 4:
            return super().construct(x)
        statistics = (self.gamma, self.beta, self.moving_mean, self.moving_variance)
        return (self.bn_train if self.training else self.bn_infer)(x, *statistics)[0]


def update_running_statistic(statistic: Parameter, value: Tensor, momentum: float) -> None:
    """Move a running mean or variance [C] towards a batch's value by the fraction `momentum`."""
    value = ops.stop_gradient(value)
    ops.assign(statistic, statistic + momentum * (value - statistic))


class QuickGELU(nn.Cell):
    """x * sigmoid(1.702 x); exact GELU would change the logits by 4 %."""

    def construct(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape."""
        return x * ops.sigmoid(1.702 * x)


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C]."""
    return x.reshape((-1, x.shape[1], x.shape[2] * x.shape[3])).transpose((0, 2, 1))


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """[B, N, C] -> [B, C, H, W]."""
    return x.transpose((0, 2, 1)).reshape((-1, x.shape[2], height, width))


class ConvEmbed(nn.Cell):
    """Convolutional token embedding (section 3.1): a strided convolution, then LayerNorm."""

    def __init__(self, stage: StageConfig) -> None:
        super().__init__()
        self.proj = conv2d(
            stage.in_channels,
            stage.dim,
            stage.kernel_size,
            stride=stage.stride,
            padding=stage.padding,
            has_bias=True,
        )
        self.norm = LayerNorm(stage.dim)

    def construct(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """x [B, C_in, height, width], or tokens [B, N_in, C_in] of such a grid -> tokens, H, W.

        The tokens are [B, N, C] on a grid of H x W.
        """
        x = self.proj(to_map(x, height, width) if x.ndim == 3 else x)  # [B, C, H, W]
        return self.norm(to_tokens(x)), x.shape[2], x.shape[3]


class FrontToken(nn.Cell):
    """Split the class token off the other tokens.

    Two `Slice` and, backward, one `Concat`. Automatic differentiation of `x[:, :1]` and `x[:, 1:]`
    would add two padded copies, and Ascend may run their `StridedSliceGrad` on the AI CPU.
    """

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 1 + N, C] -> [B, 1, C], [B, N, C]."""
        batch, tokens, channels = x.shape
        front = ops.slice(x, (0, 0, 0), (batch, 1, channels))
        return front, ops.slice(x, (0, 1, 0), (batch, tokens - 1, channels))

    def bprop(self, x: Tensor, out: tuple, dout: tuple) -> tuple[Tensor]:
        """Return the gradient of `construct`'s argument."""
        return (ops.cat((dout[0], dout[1]), 1),)


class ConvProjection(nn.Cell):
    """Depthwise 3x3 convolution and BatchNorm, the projection without its Linear (3.2).

    `shifts` is None or computes the convolution on [B, H, W, C] (`use_shifts`).
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = conv2d(
            dim, dim, KERNEL_SIZE, stride=stride, padding=PADDING, group=dim, has_bias=False
        )
        self.bn = BatchNorm2d(dim)
        self.shifts = None

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], with `shifts` [B, H, W, C] -> tokens [B, N', C] of the strided grid."""
        if self.shifts is None:
            return to_tokens(self.bn(self.conv(x)))
        x = self.shifts(x, self.conv.weight)  # [B, H', W', C]
        rows = self.bn(x.reshape((-1, x.shape[3])))
        return rows.reshape((x.shape[0], -1, x.shape[3]))


def use_shifts(net: nn.Cell) -> nn.Cell:
    """Replace a network's depthwise convolutions by shifted multiply-adds, in place.

    Raises:
        UserError: the network has none.
    """
    cells = [cell for _, cell in net.cells_and_names()]
    if not any(isinstance(cell, ConvProjection) for cell in cells):
        raise UserError("this network has no convolutional projection")
    for cell in cells:
        if isinstance(cell, ConvProjection):
            cell.shifts = ShiftedDepthwise(cell.conv.stride[0])
        elif isinstance(cell, Attention):
            cell.channels_last = True
    return net


class AvgProjection(nn.Cell):
    """PyTorch's AvgPool2d(3, stride, padding=1, ceil_mode=True), the official "avg" projection.

    A window beyond the padded border divides by the number of its cells inside the padded map, not
    by nine. So this pads, pools without padding, and corrects by the ratio of the two divisors.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pool = nn.AvgPool2d(KERNEL_SIZE, stride)

    def windows(self, size: int) -> tuple[int, list[float]]:
        """Return the padding after an axis of `size` cells, and each window's correction."""
        count = -(-(size + 2 * PADDING - KERNEL_SIZE) // self.stride) + 1
        if (count - 1) * self.stride >= size + PADDING:
            count -= 1  # PyTorch: a window starts inside the map or the padding before it
        end = (count - 1) * self.stride + KERNEL_SIZE
        seen = [min(KERNEL_SIZE, size + 2 * PADDING - i * self.stride) for i in range(count)]
        return max(end - size - PADDING, 0), [KERNEL_SIZE / n for n in seen]

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> tokens [B, N', C] of the strided grid."""
        below, rows = self.windows(x.shape[2])
        right, columns = self.windows(x.shape[3])
        x = self.pool(ops.pad(x, (PADDING, right, PADDING, below)))  # [B, C, H', W']
        x = x * Tensor(rows, mstype.float32).reshape((-1, 1)) * Tensor(columns, mstype.float32)
        return to_tokens(x)


class Attention(nn.Cell):
    """Multi-head attention over convolutional projections (section 3.2).

    `slots` yields the model's slots of random bits (see `stochastic`).
    """

    def __init__(self, stage: StageConfig, slots: Iterator[int]) -> None:
        super().__init__()
        dim = stage.dim
        self.num_heads = stage.num_heads
        self.head_dim = dim // stage.num_heads
        self.has_cls_token = stage.cls_token
        self.qkv_projection = stage.qkv_projection
        self.channels_last = False  # layout of the projections' input; True with `use_shifts`
        self.split_front = FrontToken()
        if stage.qkv_projection == "conv":
            self.conv_proj_q = ConvProjection(dim, stride=1)
            self.conv_proj_k = ConvProjection(dim, stage.kv_stride)
            self.conv_proj_v = ConvProjection(dim, stage.kv_stride)
        elif stage.qkv_projection == "avg":
            self.pool_kv = AvgProjection(stage.kv_stride)
        self.proj_q = dense(dim, dim)
        self.proj_k = dense(dim, dim)
        self.proj_v = dense(dim, dim)
        self.proj = dense(dim, dim)
        self.proj_drop = Dropout(stage.drop_rate, next(slots))
        # The official code scales by the whole dimension, not the head's.
        self.attend = ScaledDotProductAttention(stage.num_heads, self.head_dim, scale=dim**-0.5)

    def project(
        self, x: Tensor, height: int, width: int, only_cls: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens [B, T, C] to q [B, T or 1, C], k and v [B, T', C], without Linears."""
        cls, tokens = self.split_front(x) if self.has_cls_token else (None, x)
        if self.qkv_projection == "linear":
            return (cls if only_cls else x), x, x
        if self.qkv_projection == "conv":
            grid = tokens.reshape((-1, height, width, x.shape[2]))
            grid = grid if self.channels_last else to_map(tokens, height, width)
            q, k, v = self.conv_proj_q(grid), self.conv_proj_k(grid), self.conv_proj_v(grid)
        else:
            q, k = tokens, self.pool_kv(to_map(tokens, height, width))
            v = k
        if self.has_cls_token:  # it bypasses the convolution
            # With `only_cls`, the query's convolution runs only to update BatchNorm's statistics.
            q = ops.depend(cls, q) if only_cls else ops.cat((cls, q), 1)
            k, v = ops.cat((cls, k), 1), ops.cat((cls, v), 1)
        return q, k, v

    def kv_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Return the grid (H', W') of keys and values for a grid (H, W) of tokens."""
        if self.qkv_projection == "linear":
            return tuple(grid)
        if self.qkv_projection == "avg":
            return tuple(len(self.pool_kv.windows(edge)[1]) for edge in grid)
        return tuple((edge - 1) // self.conv_proj_k.conv.stride[0] + 1 for edge in grid)

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape [B, T, C] to [B, h, T, C / h]."""
        return x.reshape((-1, x.shape[1], self.num_heads, self.head_dim)).transpose((0, 2, 1, 3))

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """x [B, T, C] on a grid of height x width -> [B, T, C], or [B, 1, C] for the class token.

        The class token's query bypasses the convolution, which then only updates BatchNorm's
        statistics.
        """
        q, k, v = self.project(x, height, width, only_cls)
        q = self.split_heads(self.proj_q(q))
        k = self.split_heads(self.proj_k(k))
        v = self.split_heads(self.proj_v(v))
        x = self.attend(q, k, v).transpose((0, 2, 1, 3))  # [B, T, h, C / h]
        x = x.reshape((-1, x.shape[1], self.num_heads * self.head_dim))
        return self.proj_drop(self.proj(x), bits)


class Mlp(nn.Cell):
    """Linear, activation, Linear."""

    def __init__(
        self, dim: int, hidden_dim: int, act: nn.Cell, drop_rate: float, slots: Iterator[int]
    ) -> None:
        super().__init__()
        self.fc1 = dense(dim, hidden_dim)
        self.act = act
        self.fc2 = dense(hidden_dim, dim)
        self.drop1 = Dropout(drop_rate, next(slots))
        self.drop2 = Dropout(drop_rate, next(slots))

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        x = self.drop1(self.act(self.fc1(x)), bits)
        return self.drop2(self.fc2(x), bits)


class Block(nn.Cell):
    """Pre-norm transformer block: x + attention, then x + MLP, each with drop path."""

    def __init__(self, stage: StageConfig, drop_path_rate: float, slots: Iterator[int]) -> None:
        super().__init__()
        self.norm1 = LayerNorm(stage.dim)
        self.attn = Attention(stage, slots)
        self.drop_path1 = DropPath(drop_path_rate, next(slots))
        self.norm2 = LayerNorm(stage.dim)
        hidden_dim = int(stage.dim * stage.mlp_ratio)
        self.mlp = Mlp(stage.dim, hidden_dim, QuickGELU(), stage.drop_rate, slots)
        self.drop_path2 = DropPath(drop_path_rate, next(slots))
        self.split_front = FrontToken()

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """x [B, T, C] on a grid of height x width -> [B, T, C], or the class token's [B, 1, C]."""
        attended = self.attn(self.norm1(x), height, width, bits, only_cls)
        x = (self.split_front(x)[0] if only_cls else x) + self.drop_path1(attended, bits)
        return x + self.drop_path2(self.mlp(self.norm2(x), bits), bits)


def token_parameter(*shape: int) -> Parameter:
    """Create a learned token or position embedding, initialised trunc-normal .02."""
    return Parameter(initializer(trunc_normal(), shape, mstype.float32))
