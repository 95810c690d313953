"""Layers in compiled operators for CPUs: fewer passes over memory, no transposes.

`use_compiled` replaces the cells of a network in place. Parameters, their names and the computation
stay the same except for rounding. Float32 only.
"""

from __future__ import annotations

from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.kernels import functions
from src.kernels.update import RunningStatistics
from src.models import vit
from src.models.layers import (
    Attention,
    BatchNorm2d,
    Block,
    ConvEmbed,
    LayerNorm,
)


class CompiledLayerNorm(LayerNorm):
    """LayerNorm in one operator."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.operator = functions.LayerNorm(library, self.epsilon)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.operator(x, self.gamma, self.beta)


class CompiledConvEmbed(ConvEmbed):
    """The convolution as a matrix product over its windows, on tokens."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        conv = self.proj
        self.unfold = functions.Unfold(library, conv.kernel_size[0], conv.stride[0], conv.padding)
        self.grid = lambda edge: (
            (edge + 2 * conv.padding - conv.kernel_size[0]) // conv.stride[0] + 1
        )
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """Compute as `ConvEmbed`."""
        if x.ndim == 4:
            x = x.transpose((0, 2, 3, 1)).reshape((-1, height * width, x.shape[1]))
        weight = self.proj.weight.transpose((0, 2, 3, 1)).reshape((self.proj.weight.shape[0], -1))
        x = self.product(self.unfold(x, height, width), weight) + self.proj.bias
        height, width = self.grid(height), self.grid(width)
        return self.norm(x.reshape((-1, height * width, x.shape[1]))), height, width


class BiasFreeLinear:
    """A mixin for Linears without bias; the next operator adds it."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, T, C], weight [C', C] -> [B, T, C']."""
        y = self.product(x.reshape((-1, x.shape[2])), weight)
        return y.reshape((-1, x.shape[1], y.shape[1]))


class CompiledAttention(BiasFreeLinear, Attention):
    """CvT's attention: convolution and BatchNorm in one operator, biases and heads in one pass."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.norms = nn.CellList(
            [
                functions.ConvNorm(library, each.conv.stride[0], each.bn.eps)
                for each in (self.conv_proj_q, self.conv_proj_k, self.conv_proj_v)
            ]
        )
        self.move_statistics = RunningStatistics(library)
        self.split = functions.SplitHeads(library, self.num_heads)
        self.softmax = functions.Softmax(library, self.attend.scale)
        self.merge = functions.MergeHeads(library, self.num_heads)
        self.product = ops.MatMul(transpose_b=True)

    def _norm(self, index: int, projection, x: Tensor, height: int, width: int) -> Tensor:
        norm, bn, weight = self.norms[index], projection.bn, projection.conv.weight
        if not bn.training:
            statistics = bn.moving_mean, bn.moving_variance
            return norm.with_statistics(x, weight, bn.gamma, bn.beta, *statistics, height, width)
        y, mean, variance = norm(x, weight, bn.gamma, bn.beta, height, width)
        count = y.shape[0] * (y.shape[1] - int(self.has_cls_token))
        momentum = Tensor(bn.momentum, mstype.float32)
        unbiased = Tensor(count / max(count - 1, 1), mstype.float32)
        self.move_statistics(mean, variance, momentum, unbiased, bn.moving_mean, bn.moving_variance)
        return y

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """Compute as `Attention`, without the last Linear's bias."""
        q = x[:, :1]
        if not only_cls:
            q = self._norm(0, self.conv_proj_q, x, height, width)
        elif self.conv_proj_q.bn.training:  # to update its statistics
            q = ops.depend(q, self._norm(0, self.conv_proj_q, x, height, width))
        k = self._norm(1, self.conv_proj_k, x, height, width)
        v = self._norm(2, self.conv_proj_v, x, height, width)
        q = self.split(self.linear(q, self.proj_q.weight), self.proj_q.bias)
        k = self.split(self.linear(k, self.proj_k.weight), self.proj_k.bias)
        v = self.split(self.linear(v, self.proj_v.weight), self.proj_v.bias)
        weights = self.softmax(self.attend.scores(q, k))  # [B, h, T, T']
        return self.linear(self.merge(self.attend.mix(weights, v)), self.proj.weight)


class CompiledViTAttention(BiasFreeLinear, vit.Attention):
    """ViT's attention: biases and heads in one pass."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.split = functions.SplitHeads(library, self.num_heads)
        self.softmax = functions.Softmax(library, self.attend.scale)
        self.merge = functions.MergeHeads(library, self.num_heads)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """Compute as `vit.Attention`, without the last Linear's bias."""
        dim = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = self.split(self.linear(x, weight[:dim]), bias[:dim])
        k = self.split(self.linear(x, weight[dim : 2 * dim]), bias[dim : 2 * dim])
        v = self.split(self.linear(x, weight[2 * dim :]), bias[2 * dim :])
        weights = self.softmax(self.attend.scores(q, k))  # [B, h, T, T]
        return self.linear(self.merge(self.attend.mix(weights, v)), self.proj.weight)


class CompiledBranches(BiasFreeLinear):
    """A mixin for a block's two branches: biases, activation and residuals in one pass each."""

    activation = ""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.end = functions.BiasResidual(library)
        self.act = functions.BiasActivation(library, self.activation)
        self.product = ops.MatMul(transpose_b=True)

    def finish(self, x: Tensor, attended: Tensor, bits: Tensor | None) -> Tensor:
        """Add attention and MLP to x: x and attended (without bias) [B, T, C] -> [B, T, C]."""
        ones = ops.ones((x.shape[0],), mstype.float32)
        keep = self.drop_path1.factors(bits)
        x = self.end(x, attended, self.attn.proj.bias, ones if keep is None else keep)
        y = self.norm2(x).reshape((-1, x.shape[2]))
        y = self.act(self.product(y, self.mlp.fc1.weight), self.mlp.fc1.bias)
        y = self.product(y, self.mlp.fc2.weight).reshape(x.shape)
        keep = self.drop_path2.factors(bits)
        return self.end(x, y, self.mlp.fc2.bias, ones if keep is None else keep)


class CompiledBlock(CompiledBranches, Block):
    """CvT's block in compiled operators."""

    activation = "quick_gelu"

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """Compute as `Block`."""
        attended = self.attn(self.norm1(x), height, width, bits, only_cls)
        return self.finish(x[:, :1] if only_cls else x, attended, bits)


class CompiledViTBlock(CompiledBranches, vit.Block):
    """ViT's block in compiled operators."""

    activation = "gelu"

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """Compute as `vit.Block`."""
        return self.finish(x, self.attn(self.norm1(x), bits), bits)


def use_compiled(net: nn.Cell, library: Path) -> nn.Cell:
    """Replace a network's cells by compiled ones where they exist, in place.

    library: the path that `src.kernels.library` returns.
    """
    for _, cell in list(net.cells_and_names()):
        if type(cell) in (Block, vit.Block):
            if _is_plain(cell.attn):
                for each in (cell, cell.attn):
                    _replace_class(each, COMPILED[type(each)], library)
        elif type(cell) in (LayerNorm, ConvEmbed):
            _replace_class(cell, COMPILED[type(cell)], library)
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
    """Return whether the compiled attention supports all options of an attention."""
    if attn.proj_drop.rate > 0.0 or attn.attend.flash:
        return False
    if isinstance(attn, vit.Attention):
        return True
    if attn.qkv_projection != "conv" or attn.channels_last:
        return False
    return type(attn.conv_proj_q.bn) is BatchNorm2d


def _replace_class(cell: nn.Cell, kind: type, library: Path) -> None:
    cell.__class__ = kind
    cell.prepare(library)


def has_plain_convolutions(net: nn.Cell) -> bool:
    """Return whether any convolution of a network runs in the framework's kernel."""
    compiled = set()
    for _, cell in net.cells_and_names():
        if isinstance(cell, (CompiledAttention, CompiledConvEmbed)):
            compiled |= {id(inner) for _, inner in cell.cells_and_names()}
    return any(
        isinstance(cell, nn.Conv2d) and id(cell) not in compiled
        for _, cell in net.cells_and_names()
    )
