"""Layers in compiled operators for CPUs: fewer passes over memory, no transposes.

`use_compiled` replaces the cells of a network in place. Parameters, their names and the computation
stay the same except for rounding. Float32 only.
"""

from __future__ import annotations

from pathlib import Path

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.kernels import branches, functions
from src.kernels.update import RunningStatistics
from src.models import vit
from src.models.layers import Attention, BatchNorm2d, Block, ConvEmbed, LayerNorm
from src.models.stochastic import DropPath

# Elements of a weight up to which an operator computes the products of a whole branch itself, from
# the cache. Beyond it, training of CvT-13 is faster with MindSpore's products.
FUSED_SIZE = 2**16


class CompiledLayerNorm(LayerNorm):
    """LayerNorm in one operator."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.operator = functions.LayerNorm(library, self.epsilon)

    def construct(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.operator(x, self.gamma, self.beta)


class CompiledConvEmbed(ConvEmbed):
    """The convolution as a matrix product over its windows, on tokens; small ones with the norm."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        conv = self.proj
        self.unfold = functions.Unfold(library, conv.kernel_size[0], conv.stride[0], conv.padding)
        self.grid = lambda edge: (
            (edge + 2 * conv.padding - conv.kernel_size[0]) // conv.stride[0] + 1
        )
        self.product = ops.MatMul(transpose_b=True)
        self.embed = branches.ConvEmbed(
            library, conv.kernel_size[0], conv.stride[0], conv.padding, self.norm.epsilon
        )
        self.is_small = conv.weight.size <= 2 * FUSED_SIZE

    def construct(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """Compute as `ConvEmbed`."""
        if x.ndim == 4:
            x = x.transpose((0, 2, 3, 1)).reshape((-1, height * width, x.shape[1]))
        if self.is_small:
            conv, norm = self.proj, self.norm
            x = self.embed(x, conv.weight, conv.bias, norm.gamma, norm.beta, height, width)
            return x, self.grid(height), self.grid(width)
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
    """CvT's attention with the LayerNorm before it and the residual behind it.

    A block calls `project_normalised` and then the cell.
    """

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.move_statistics = RunningStatistics(library)
        self.fused = functions.Attention(library, self.num_heads, self.attend.scale)
        self.branch = branches.AttentionBranch(library, self.num_heads, self.attend.scale)
        self.end = functions.BiasResidual(library)
        self.is_small = self.proj.weight.size <= FUSED_SIZE and self.head_dim % 16 == 0
        self.product = ops.MatMul(transpose_b=True)

    def prepare_projections(self, library: Path, norm: LayerNorm) -> None:
        """Create the operator of the projections, with the block's LayerNorm before them."""
        self.project_tokens = branches.ConvProjections(
            library, self.conv_proj_k.conv.stride[0], norm.epsilon, self.conv_proj_k.bn.eps
        )

    def project_normalised(
        self, x: Tensor, norm: LayerNorm, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project norm(x) to q [B, T, C], k and v [B, T', C], without Linears."""
        q, k, v = self.conv_proj_q, self.conv_proj_k, self.conv_proj_v
        tensors = (
            *(norm.gamma, norm.beta, q.conv.weight, k.conv.weight, v.conv.weight),
            *(q.bn.gamma, k.bn.gamma, v.bn.gamma, q.bn.beta, k.bn.beta, v.bn.beta),
        )
        statistics = (
            *(q.bn.moving_mean, k.bn.moving_mean, v.bn.moving_mean),
            *(q.bn.moving_variance, k.bn.moving_variance, v.bn.moving_variance),
        )
        learns_q, learns_k, learns_v = q.bn.training, k.bn.training, v.bn.training
        if not (learns_q or learns_k or learns_v):
            given = (*tensors, *statistics)
            return self.project_tokens.with_statistics(x, given, height, width)
        # gamma stands for statistics that are not read: MindSpore keeps the outputs of an operator
        # that reads what changes in place, instead of computing them again.
        given = (
            *tensors,
            q.bn.gamma if learns_q else q.bn.moving_mean,
            k.bn.gamma if learns_k else k.bn.moving_mean,
            v.bn.gamma if learns_v else v.bn.moving_mean,
            q.bn.gamma if learns_q else q.bn.moving_variance,
            k.bn.gamma if learns_k else k.bn.moving_variance,
            v.bn.gamma if learns_v else v.bn.moving_variance,
        )
        learns = Tensor([float(learns_q), float(learns_k), float(learns_v)], mstype.float32)
        out = self.project_tokens(x, given, learns, height, width)
        momenta = [q.bn.momentum * learns_q, k.bn.momentum * learns_k, v.bn.momentum * learns_v]
        corrections = [self._unbiased(out[0]), self._unbiased(out[1]), self._unbiased(out[2])]
        self.move_statistics(
            out[3:],
            statistics,
            Tensor(momenta, mstype.float32),
            Tensor(corrections, mstype.float32),
        )
        return out[:3]

    def _unbiased(self, y: Tensor) -> float:
        """Return the factor that makes a biased variance over tokens [B, T, C] unbiased."""
        count = y.shape[0] * (y.shape[1] - int(self.has_cls_token))
        return count / max(count - 1, 1)

    def construct(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        """Compute x + keep * attention.

        Args:
            x: [B, T, C].
            q, k, v: what `project_normalised` returns.
            keep: drop path's factors [B].

        Returns:
            [B, T, C].
        """
        of_q, of_k, of_v, last = self.proj_q, self.proj_k, self.proj_v, self.proj
        if self.is_small:
            weights = (of_q.weight, of_k.weight, of_v.weight, last.weight)
            biases = (of_q.bias, of_k.bias, of_v.bias, last.bias)
            return self.branch(x, (q, k, v), (*weights, *biases), keep)
        q, k = self.linear(q, of_q.weight), self.linear(k, of_k.weight)
        v = self.linear(v, of_v.weight)
        mixed = self.fused(q, k, v, of_q.bias, of_k.bias, of_v.bias)
        return self.end(x, self.linear(mixed, last.weight), last.bias, keep)


class CompiledViTAttention(BiasFreeLinear, vit.Attention):
    """ViT's attention: biases, scores, softmax and weighted sum in one operator."""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.fused = functions.Attention(library, self.num_heads, self.attend.scale)
        self.product = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """Compute as `vit.Attention`, without the last Linear's bias."""
        dim = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        parts = [(weight[i * dim : (i + 1) * dim], bias[i * dim : (i + 1) * dim]) for i in range(3)]
        x = self.fused(*(self.linear(x, each) for each, _ in parts), *(each for _, each in parts))
        return self.linear(x, self.proj.weight)


class CompiledBranches(BiasFreeLinear):
    """A mixin for a block's two branches: few operators, or one for a branch of small weights."""

    activation = ""

    def prepare(self, library: Path) -> None:
        """Create the fused operators."""
        self.end = functions.BiasResidual(library)
        self.act = functions.BiasActivation(library, self.activation)
        self.product = ops.MatMul(transpose_b=True)
        self.branch = branches.MlpBranch(library, self.activation, self.norm2.epsilon)
        self.is_small = self.mlp.fc1.weight.size <= FUSED_SIZE

    def factors(self, drop_path: DropPath, x: Tensor, bits: Tensor | None) -> Tensor:
        """Return a drop path's factors [B]."""
        keep = drop_path.factors(bits)
        return ops.ones((x.shape[0],), mstype.float32) if keep is None else keep

    def add_mlp(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """Add the MLP to x [B, T, C]."""
        keep = self.factors(self.drop_path2, x, bits)
        norm, fc1, fc2 = self.norm2, self.mlp.fc1, self.mlp.fc2
        if self.is_small:
            linears = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
            return self.branch(x, norm.gamma, norm.beta, *linears, keep)
        y = norm(x).reshape((-1, x.shape[2]))
        y = self.act(self.product(y, fc1.weight), fc1.bias)
        y = self.product(y, fc2.weight).reshape(x.shape)
        return self.end(x, y, fc2.bias, keep)


class CompiledBlock(CompiledBranches, Block):
    """CvT's block in compiled operators."""

    activation = "quick_gelu"

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> Tensor:
        """Compute as `Block`."""
        q, k, v = self.attn.project_normalised(x, self.norm1, height, width)
        if only_cls:  # the other queries were needed for BatchNorm's statistics only
            x, q = x[:, :1], q[:, :1]
        return self.add_mlp(self.attn(x, q, k, v, self.factors(self.drop_path1, x, bits)), bits)


class CompiledViTBlock(CompiledBranches, vit.Block):
    """ViT's block in compiled operators."""

    activation = "gelu"

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """Compute as `vit.Block`."""
        keep = self.factors(self.drop_path1, x, bits)
        x = self.end(x, self.attn(self.norm1(x), bits), self.attn.proj.bias, keep)
        return self.add_mlp(x, bits)


def use_compiled(net: nn.Cell, library: Path) -> nn.Cell:
    """Replace a network's cells by compiled ones where they exist, in place.

    library: the path that `src.kernels.library` returns.
    """
    for _, cell in list(net.cells_and_names()):
        if type(cell) in (Block, vit.Block):
            if _is_plain(cell.attn):
                for each in (cell, cell.attn):
                    _replace_class(each, COMPILED[type(each)], library)
                if isinstance(cell, CompiledBlock):
                    cell.attn.prepare_projections(library, cell.norm1)
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
