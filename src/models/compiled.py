"""The same layers in compiled operators, for CPUs: fewer passes over memory, no transposes.

`use_compiled` turns the cells of a network into the ones below, in place: parameters, their names
and what is computed stay, rounding does not. Float32 only.
"""

from __future__ import annotations

from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.kernels import functions
from src.models import vit
from src.models.layers import Attention, BatchNorm2d, Block, ConvEmbed, LayerNorm


class CompiledLayerNorm(LayerNorm):
    """LayerNorm in one operator."""

    def prepare(self, library: Path) -> None:
        """Make what computes."""
        self.operator = functions.LayerNorm(library, self.epsilon)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.operator(x, self.gamma, self.beta)


class CompiledConvEmbed(ConvEmbed):
    """The convolution as a matrix product over its windows, on tokens."""

    def prepare(self, library: Path) -> None:
        """Make what computes."""
        conv = self.proj
        self.unfold = functions.Unfold(library, conv.kernel_size[0], conv.stride[0], conv.padding)
        self.grid = lambda edge: (
            (edge + 2 * conv.padding - conv.kernel_size[0]) // conv.stride[0] + 1
        )
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """As `ConvEmbed`."""
        if x.ndim == 4:
            x = x.transpose((0, 2, 3, 1)).reshape((-1, height * width, x.shape[1]))
        weight = self.proj.weight.transpose((0, 2, 3, 1)).reshape((self.proj.weight.shape[0], -1))
        x = self.product(self.unfold(x, height, width), weight) + self.proj.bias
        height, width = self.grid(height), self.grid(width)
        return self.norm(x.reshape((-1, height * width, x.shape[1]))), height, width


class Products:
    """Linears without their bias, for the cells below: theirs goes into the next operator."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, C], weight [C', C] -> [B, T, C']."""
        y = self.product(x.reshape((-1, x.shape[2])), weight)
        return y.reshape((-1, x.shape[1], y.shape[1]))


class CompiledAttention(Products, Attention):
    """Convolution and BatchNorm as one operator on tokens; biases and heads in one pass."""

    def prepare(self, library: Path) -> None:
        """Make what computes."""
        self.norms = nn.CellList(
            [
                functions.ConvNorm(library, each.conv.stride[0], each.bn.eps)
                for each in (self.conv_proj_q, self.conv_proj_k, self.conv_proj_v)
            ]
        )
        self.split = functions.SplitHeads(library, self.num_heads)
        self.softmax = functions.Softmax(library, self.attend.scale)
        self.merge = functions.MergeHeads(library, self.num_heads)
        self.product = ops.MatMul(transpose_b=True)

    def _norm(self, index: int, projection, x: Tensor, height: int, width: int) -> Tensor:
        norm, bn, weight = self.norms[index], projection.bn, projection.conv.weight
        if not bn.training:
            scale = bn.gamma * ops.rsqrt(bn.moving_variance + bn.eps)
            shift = bn.beta - bn.moving_mean * scale
            return norm.affine(x, weight, scale, shift, height, width)
        y, mean, variance = norm(x, weight, bn.gamma, bn.beta, height, width)
        count = y.shape[0] * (y.shape[1] - int(self.has_cls_token))
        follow(bn.moving_mean, mean, bn.momentum)
        follow(bn.moving_variance, variance * (count / max(count - 1, 1)), bn.momentum)
        return y

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """As `Attention`, but without the last Linear's bias."""
        q = x[:, :1]
        if not only_cls:
            q = self._norm(0, self.conv_proj_q, x, height, width)
        elif self.conv_proj_q.bn.training:  # for its statistics
            q = ops.depend(q, self._norm(0, self.conv_proj_q, x, height, width))
        k = self._norm(1, self.conv_proj_k, x, height, width)
        v = self._norm(2, self.conv_proj_v, x, height, width)
        q = self.split(self.linear(q, self.proj_q.weight), self.proj_q.bias)
        k = self.split(self.linear(k, self.proj_k.weight), self.proj_k.bias)
        v = self.split(self.linear(v, self.proj_v.weight), self.proj_v.bias)
        weights = self.softmax(self.attend.scores(q, k))  # [B, h, T, T']
        return self.linear(self.merge(self.attend.mix(weights, v)), self.proj.weight)


class CompiledViTAttention(Products, vit.Attention):
    """Biases and heads in one pass."""

    def prepare(self, library: Path) -> None:
        """Make what computes."""
        self.split = functions.SplitHeads(library, self.num_heads)
        self.softmax = functions.Softmax(library, self.attend.scale)
        self.merge = functions.MergeHeads(library, self.num_heads)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """As `vit.Attention`, but without the last Linear's bias."""
        dim = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = self.split(self.linear(x, weight[:dim]), bias[:dim])
        k = self.split(self.linear(x, weight[dim : 2 * dim]), bias[dim : 2 * dim])
        v = self.split(self.linear(x, weight[2 * dim :]), bias[2 * dim :])
        weights = self.softmax(self.attend.scores(q, k))  # [B, h, T, T]
        return self.linear(self.merge(self.attend.mix(weights, v)), self.proj.weight)


class Branches(Products):
    """The ends of a block's two branches: biases, activation and residuals in one pass each."""

    activation = ""

    def prepare(self, library: Path) -> None:
        """Make what computes."""
        self.end = functions.BiasResidual(library)
        self.act = functions.BiasActivation(library, self.activation)
        self.product = ops.MatMul(transpose_b=True)

    def finish(self, x: Tensor, attended: Tensor, bits: Tensor | None) -> Tensor:
        """x and its attention without the last bias, both [B, T, C] -> [B, T, C]."""
        ones = ops.ones((x.shape[0],), mstype.float32)
        keep = self.drop_path1.factors(bits)
        x = self.end(x, attended, self.attn.proj.bias, ones if keep is None else keep)
        y = self.norm2(x).reshape((-1, x.shape[2]))
        y = self.act(self.product(y, self.mlp.fc1.weight), self.mlp.fc1.bias)
        y = self.product(y, self.mlp.fc2.weight).reshape(x.shape)
        keep = self.drop_path2.factors(bits)
        return self.end(x, y, self.mlp.fc2.bias, ones if keep is None else keep)


class CompiledBlock(Branches, Block):
    """CvT's block."""

    activation = "quick_gelu"

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """As `Block`."""
        attended = self.attn(self.norm1(x), height, width, bits, only_cls)
        return self.finish(x[:, :1] if only_cls else x, attended, bits)


class CompiledViTBlock(Branches, vit.Block):
    """ViT's block."""

    activation = "gelu"

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """As `vit.Block`."""
        return self.finish(x, self.attn(self.norm1(x), bits), bits)


def follow(statistic: Tensor, value: Tensor, momentum: float) -> None:
    """Move a running statistic."""
    value = ops.stop_gradient(value)
    ops.assign(statistic, statistic + momentum * (value - statistic))


def use_compiled(net: nn.Cell, library: Path) -> nn.Cell:
    """Let a network compute in compiled operators where it has them.

    library: what `src.kernels.library` built.
    """
    for _, cell in list(net.cells_and_names()):
        if type(cell) in (Block, vit.Block):
            if _is_plain(cell.attn):
                for each in (cell, cell.attn):
                    _become(each, COMPILED[type(each)], library)
        elif type(cell) in (LayerNorm, ConvEmbed):
            _become(cell, COMPILED[type(cell)], library)
    return net


COMPILED = {
    LayerNorm: CompiledLayerNorm,
    ConvEmbed: CompiledConvEmbed,
    Attention: CompiledAttention,
    Block: CompiledBlock,
    vit.Attention: CompiledViTAttention,
    vit.Block: CompiledViTBlock,
}


def _is_plain(attn: nn.Cell) -> bool:
    """Whether an attention has no option that the compiled one does not know."""
    if attn.proj_drop.rate > 0.0 or attn.attend.flash:
        return False
    if isinstance(attn, vit.Attention):
        return True
    if attn.qkv_projection != "conv" or attn.channels_last:
        return False
    return type(attn.conv_proj_q.bn) is BatchNorm2d


def _become(cell: nn.Cell, kind: type, library: Path) -> None:
    cell.__class__ = kind
    cell.prepare(library)


def has_plain_convolutions(net: nn.Cell) -> bool:
    """Whether convolutions of a network run in the framework's kernel."""
    compiled = set()
    for _, cell in net.cells_and_names():
        if isinstance(cell, (CompiledAttention, CompiledConvEmbed)):
            compiled |= {id(inner) for _, inner in cell.cells_and_names()}
    return any(
        isinstance(cell, nn.Conv2d) and id(cell) not in compiled
        for _, cell in net.cells_and_names()
    )
