"""Exact rewrites of a trained CvT for inference: other arithmetic, the same function.

Each is a switch of `Rewrites`, all on by default. With w the depthwise kernels, s = gamma /
sqrt(variance + eps) and t = beta - mean * s of a BatchNorm, W and b a Linear's weight and bias:

- batch_norm: s * conv(x; w) + t = conv(x; s * w) + t. (Where there is a class token it can't go on
  into the Linear, because that token bypasses convolution and BatchNorm.)
- merged_kv: k = conv(x; w_k) and v = conv(x; w_v) are the two outputs for each channel of one
  depthwise convolution with channel multiplier 2, which reads x once.
- scale: c * (W x + b) = (c W) x + c b, with the attention's c = dim ** -0.5, in the q Linear.
- activation: QuickGELU(x) = x * sigmoid(1.702 x) = SiLU(1.702 x) / 1.702: 1.702 goes into the first
  Linear of the MLP, 1 / 1.702 into the weight of the second.
- channels_first: a Linear over the tokens is a 1x1 convolution over the map, so q, k and v stay
  [B, C, T] from the depthwise convolution to the scores, without transposes to tokens and back.
- biases: softmax doesn't see what it adds to every key's score, so k needs no bias; its weights sum
  to 1, so v's bias b_v goes through the output's Linear: W_o (v + b_v) = W_o v + W_o b_v. And where
  no class token bypasses the convolutions, their t goes the same ways: W (x + t) = W x + W t.
- cls_query: only the class token reaches the head, so the last block computes its row alone:
  one query on all keys, one row of the MLP.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.models.cvt import CvT, Stage
from src.models.layers import PADDING, Attention, Block, ConvProjection, Mlp, to_map

_QUICK_GELU = 1.702


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites `fuse` makes; the module's text tells what each is."""

    batch_norm: bool = True
    merged_kv: bool = True
    scale: bool = True
    activation: bool = True
    channels_first: bool = True
    biases: bool = True
    cls_query: bool = True


def fuse(net: CvT, rewrites: Rewrites | None = None) -> FusedCvT:
    """A network for inference that computes what `net` computes in evaluation mode.

    Args:
        net: trained, and left as it is; no weight is shared. What an option of it has no use for
            (no convolution with the "avg" and "linear" projections, no class token) stays undone.
        rewrites: all of them by default.

    Returns:
        A cell: float32 images [B, C, H, W] -> logits [B, num_classes].
    """
    return FusedCvT(net, rewrites or Rewrites()).set_train(False)


class FusedCvT(nn.Cell):
    """`CvT` in evaluation mode, rewritten; its cells hold copies of the weights."""

    def __init__(self, net: CvT, rewrites: Rewrites) -> None:
        super().__init__()
        stages = (net.stage0, net.stage1, net.stage2)
        self.only_cls = rewrites.cls_query and net.stage2.has_cls_token
        self.stage0, self.stage1, self.stage2 = (
            FusedStage(stage, rewrites, self.only_cls and stage is net.stage2) for stage in stages
        )
        self.norm = copy.deepcopy(net.norm)
        self.head = copy.deepcopy(net.head) if net.num_classes else nn.Identity()
        self.has_cls_token = net.stage2.has_cls_token

    def construct(self, images: Tensor) -> Tensor:
        """Images float32 [B, C, H, W] -> logits float32 [B, num_classes], or features [B, C']."""
        x, height, width = self.stage0(images, images.shape[2], images.shape[3])
        x, height, width = self.stage1(x, height, width)
        x, height, width = self.stage2(x, height, width)  # [B, T, C'], or [B, 1, C']
        feature = self.norm(x[:, 0]) if self.has_cls_token else self.norm(x).mean(1)
        return self.head(feature).astype(mstype.float32)


class FusedStage(nn.Cell):
    """Token embedding, then blocks; the last may be for the class token only."""

    def __init__(self, stage: Stage, rewrites: Rewrites, only_cls: bool) -> None:
        super().__init__()
        self.patch_embed = copy.deepcopy(stage.patch_embed)
        self.has_pos_embed = stage.pos_embed_grid is not None
        if self.has_pos_embed:
            self.pos_embed = copy.deepcopy(stage.pos_embed)
        self.has_cls_token = stage.has_cls_token
        if stage.has_cls_token:
            self.cls_token = copy.deepcopy(stage.cls_token)
        last = len(stage.blocks) - 1
        self.blocks = nn.CellList(
            [FusedBlock(b, rewrites, only_cls and i == last) for i, b in enumerate(stage.blocks)]
        )

    def construct(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """As `Stage`, always for the class token alone where that is all that counts."""
        x, height, width = self.patch_embed(x, height, width)  # [B, N, C]
        if self.has_pos_embed:
            x = x + self.pos_embed
        if self.has_cls_token:
            # Not broadcast_to: ONNX would get the example's batch size as a constant.
            x = ops.cat((0 * x[:, :1] + self.cls_token, x), 1)  # [B, 1 + N, C]
        for block in self.blocks:
            x = block(x, height, width)
        return x, height, width


class FusedBlock(nn.Cell):
    """Pre-norm transformer block without the random parts."""

    def __init__(self, block: Block, rewrites: Rewrites, only_cls: bool) -> None:
        super().__init__()
        self.norm1 = copy.deepcopy(block.norm1)
        self.attn = FusedAttention(block.attn, rewrites, only_cls)
        self.norm2 = copy.deepcopy(block.norm2)
        self.mlp = FusedMlp(block.mlp, rewrites)
        self.only_cls = only_cls

    def construct(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, T, C] on a grid of height x width -> [B, T, C], or the class token's [B, 1, C]."""
        attended = self.attn(self.norm1(x), height, width)
        x = (x[:, :1] if self.only_cls else x) + attended
        return x + self.mlp(self.norm2(x))


class FusedMlp(nn.Cell):
    """Linear, SiLU, Linear."""

    def __init__(self, mlp: Mlp, rewrites: Rewrites) -> None:
        super().__init__()
        factor = _QUICK_GELU if rewrites.activation else 1.0
        fc1, fc2 = _Affine.of(mlp.fc1), _Affine.of(mlp.fc2)
        self.fc1 = _dense(fc1.times(factor))
        self.act = nn.SiLU() if rewrites.activation else copy.deepcopy(mlp.act)
        self.fc2 = _dense(fc2._replace(weight=fc2.weight / factor))

    def construct(self, x: Tensor) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        return self.fc2(self.act(self.fc1(x)))


class FusedAttention(nn.Cell):
    """Multi-head attention whose q, k and v come as columns [B, C, T] to their Linears."""

    def __init__(self, attn: Attention, rewrites: Rewrites, only_cls: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.has_cls_token, self.only_cls = attn.has_cls_token, only_cls
        self.qkv_projection, self.merged = attn.qkv_projection, rewrites.merged_kv
        q, k, v, out = (
            _Affine.of(each) for each in (attn.proj_q, attn.proj_k, attn.proj_v, attn.proj)
        )
        if attn.qkv_projection == "conv":
            conv_q, conv_k, conv_v = (
                _Convolution.of(each, rewrites.batch_norm)
                for each in (attn.conv_proj_q, attn.conv_proj_k, attn.conv_proj_v)
            )
            if rewrites.biases and rewrites.batch_norm and not attn.has_cls_token:
                q, k, v = q.after(conv_q.bias), k.after(conv_k.bias), v.after(conv_v.bias)
                conv_q, conv_k, conv_v = (c._replace(bias=None) for c in (conv_q, conv_k, conv_v))
            if not only_cls:
                self.conv_q = _depthwise([conv_q])
            if self.merged:
                self.conv_kv = _depthwise([conv_k, conv_v])
                self.split = ops.Split(0, 2)
            else:
                self.conv_k, self.conv_v = _depthwise([conv_k]), _depthwise([conv_v])
        elif attn.qkv_projection == "avg":
            self.pool_kv = copy.deepcopy(attn.pool_kv)
        if rewrites.biases:
            k, v, out = k._replace(bias=None), v._replace(bias=None), out.after(v.bias)
        self.scale = 1.0 if rewrites.scale else attn.attend.scale
        columns = rewrites.channels_first
        self.proj_q = _Heads(q.times(attn.attend.scale / self.scale), attn.num_heads, columns)
        self.proj_k = _Heads(k, attn.num_heads, columns)
        self.proj_v = _Heads(v, attn.num_heads, columns)
        self.proj = _dense(out)
        self.scores = ops.BatchMatMul(transpose_a=columns, transpose_b=not columns)
        self.mix = ops.BatchMatMul(transpose_b=columns)

    def _columns(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, T, C] -> q [B, C, T] (or the class token's [B, C, 1]), k and v [B, C, T']."""
        channels = x.shape[2]
        cls = x[:, :1].reshape((-1, channels, 1)) if self.has_cls_token else None
        if self.qkv_projection == "linear":
            k = x.transpose((0, 2, 1))
            return (cls if self.only_cls else k), k, k
        grid = to_map(x[:, 1:] if self.has_cls_token else x, height, width)
        if self.qkv_projection == "avg":
            k = v = self.pool_kv(grid).transpose((0, 2, 1))
        elif self.merged:
            kv = self.conv_kv(grid)  # [B, 2 C, H', W'], k and v of a channel side by side
            kv = kv.reshape((-1, channels, 2, kv.shape[2] * kv.shape[3])).transpose((2, 0, 1, 3))
            k, v = self.split(kv)  # [1, B, C, T'] each; indexing costs 20 times as much on the CPU
            k, v = k.squeeze(0), v.squeeze(0)
        else:
            k, v = _flat(self.conv_k(grid)), _flat(self.conv_v(grid))
        if cls is not None:  # it bypasses the convolution
            k, v = ops.cat((cls, k), 2), ops.cat((cls, v), 2)
        if self.only_cls:
            return cls, k, v
        q = _flat(self.conv_q(grid) if self.qkv_projection == "conv" else grid)
        return (q if cls is None else ops.cat((cls, q), 2)), k, v

    def construct(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [B, T, C] on a grid of height x width -> [B, T, C], or the class token's [B, 1, C]."""
        q, k, v = self._columns(x, height, width)
        q, k, v = self.proj_q(q), self.proj_k(k), self.proj_v(v)
        if self.scale != 1.0:
            q = q * self.scale
        scores = self.scores(q, k).astype(mstype.float32)  # [B, h, T, T']
        weights = ops.softmax(scores, -1).astype(v.dtype)
        x = self.mix(weights, v).transpose((0, 2, 1, 3))  # [B, T, h, C / h]
        return self.proj(x.reshape((-1, x.shape[1], self.num_heads * self.head_dim)))


class _Heads(nn.Cell):
    """The Linear of q, k or v on columns: as a 1x1 convolution, or over transposed tokens."""

    def __init__(self, linear: _Affine, num_heads: int, columns: bool) -> None:
        super().__init__()
        self.columns, self.num_heads = columns, num_heads
        self.head_dim = len(linear.weight) // num_heads
        self.linear = (
            _conv(linear.weight[:, :, None, None], linear.bias) if columns else _dense(linear)
        )

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C, T] -> [B, h, C / h, T], or [B, h, T, C / h] without columns."""
        if self.columns:
            x = self.linear(x.expand_dims(3))  # [B, C, T, 1]
            return x.reshape((-1, self.num_heads, self.head_dim, x.shape[2]))
        x = self.linear(x.transpose((0, 2, 1)))
        x = x.reshape((-1, x.shape[1], self.num_heads, self.head_dim))
        return x.transpose((0, 2, 1, 3))


class _Affine(NamedTuple):
    """A Linear's numbers: weight [C_out, C_in], bias [C_out] or None."""

    weight: np.ndarray
    bias: np.ndarray | None

    @classmethod
    def of(cls, linear: nn.Dense) -> _Affine:
        return cls(_value(linear.weight), _value(linear.bias))

    def times(self, factor: float) -> _Affine:
        """Of the Linear whose output is `factor` times as large."""
        return _Affine(factor * self.weight, factor * self.bias)

    def after(self, shift: np.ndarray) -> _Affine:
        """Of the Linear that adds `shift` [C_in] to its input by itself."""
        return self._replace(bias=self.bias + self.weight @ shift)


class _Convolution(NamedTuple):
    """A depthwise convolution's numbers: kernels [C, 1, 3, 3], bias [C] or None; what follows."""

    weight: np.ndarray
    bias: np.ndarray | None
    stride: int
    norm: nn.BatchNorm2d | None

    @classmethod
    def of(cls, projection: ConvProjection, fold: bool) -> _Convolution:
        conv, norm = projection.conv, projection.bn
        weight, stride = _value(conv.weight), conv.stride[-1]
        if not fold:
            return cls(weight, None, stride, norm)
        scale = _value(norm.gamma) / np.sqrt(_value(norm.moving_variance) + norm.eps)
        shift = _value(norm.beta) - _value(norm.moving_mean) * scale
        return cls(scale[:, None, None, None] * weight, shift, stride, None)


def _depthwise(convolutions: list[_Convolution]) -> nn.Cell:
    """One depthwise convolution for all, the outputs of a channel side by side."""

    def side_by_side(values: list[np.ndarray]) -> np.ndarray:
        return np.stack(values, 1).reshape((-1, *values[0].shape[1:]))

    first = convolutions[0]
    bias = None if first.bias is None else side_by_side([each.bias for each in convolutions])
    options = {"stride": first.stride, "padding": PADDING, "group": len(first.weight)}
    conv = _conv(side_by_side([each.weight for each in convolutions]), bias, **options)
    if first.norm is None:
        return conv
    norm = type(first.norm)(conv.out_channels)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        values = side_by_side([_value(getattr(each.norm, name)) for each in convolutions])
        getattr(norm, name).set_data(_tensor(values))
    return nn.SequentialCell(conv, norm)


def _conv(weight: np.ndarray, bias: np.ndarray | None, **options) -> nn.Conv2d:
    return nn.Conv2d(
        weight.shape[1] * options.get("group", 1),
        weight.shape[0],
        weight.shape[2],
        pad_mode="pad",
        weight_init=_tensor(weight),
        has_bias=bias is not None,
        bias_init=None if bias is None else _tensor(bias),
        **options,
    )


def _dense(linear: _Affine) -> nn.Dense:
    outputs, inputs = linear.weight.shape
    if linear.bias is None:
        return nn.Dense(inputs, outputs, _tensor(linear.weight), has_bias=False)
    return nn.Dense(inputs, outputs, _tensor(linear.weight), _tensor(linear.bias))


def _flat(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, N]."""
    return x.reshape((-1, x.shape[1], x.shape[2] * x.shape[3]))


def _value(parameter: Tensor) -> np.ndarray:
    """In float64, so that what is folded is rounded once."""
    return parameter.asnumpy().astype(np.float64)


def _tensor(values: np.ndarray) -> Tensor:
    return Tensor(values.astype(np.float32))
