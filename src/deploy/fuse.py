"""Rewrite a trained network for inference: fewer operations, the same function.

Let w be a convolution's kernels, s = gamma / sqrt(variance + eps) and t = beta - mean * s of the
BatchNorm after it, W and b a Linear's weight and bias. Then:

- s * conv(x; w) + t = conv(x; s * w) + t removes every BatchNorm.
- c * (W x + b) = (c W) x + c b puts the attention's scale c into the Linear of q.
- softmax is unchanged by a term common to all scores of a query, so k needs no bias. Its weights
  sum to 1, so v's bias b_v moves into the output's Linear: W (v + b_v) = W v + W b_v.
- QuickGELU(x) = x * sigmoid(1.702 x) = SiLU(1.702 x) / 1.702: the constant moves into the weights
  of the two Linears around it.
"""

from __future__ import annotations

import copy

import numpy as np
from mindspore import Tensor, nn

from src.models import layers, resnet, vit
from src.models.cvt import CvT

_QUICK_GELU = 1.702


def fuse(net: nn.Cell) -> nn.Cell:
    """Create a network for inference that computes what `net` computes in evaluation mode.

    Args:
        net: a trained network of the registry; it is copied, not changed.

    Returns:
        A cell of the same class and structure: images [B, C, H, W] -> logits [B, num_classes].
    """
    net = copy.deepcopy(net).set_train(False)
    for _, cell in list(net.cells_and_names()):
        if isinstance(cell, (layers.ConvProjection, resnet.ConvBatchNorm)):
            _fold_batch_norm(cell)
        elif isinstance(cell, layers.Attention):
            _fold_attention(cell)
        elif isinstance(cell, vit.Attention):
            _fold_scale(cell.attend, cell.qkv, rows=cell.num_heads * cell.head_dim)
        elif isinstance(cell, layers.Mlp) and isinstance(cell.act, layers.QuickGELU):
            _set(cell.fc1, _QUICK_GELU * _value(cell.fc1.weight), _QUICK_GELU * _bias(cell.fc1))
            _set(cell.fc2, _value(cell.fc2.weight) / _QUICK_GELU, _bias(cell.fc2))
            cell.act = nn.SiLU()
    if isinstance(net, CvT) and net.stage2.has_cls_token:
        last = net.stage2.blocks[-1].attn
        if last.qkv_projection == "conv":  # its only query, the class token, bypasses it
            last.conv_proj_q = nn.Identity()
    for name, parameter in net.parameters_and_names():
        parameter.name = name  # new cells do not have the full name
    return net


def _fold_batch_norm(cell: layers.ConvProjection | resnet.ConvBatchNorm) -> None:
    norm, conv = cell.bn, cell.conv
    scale = _value(norm.gamma) / np.sqrt(_value(norm.moving_variance) + norm.eps)
    shift = _value(norm.beta) - _value(norm.moving_mean) * scale
    cell.bn = nn.Identity()
    cell.conv = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        pad_mode="pad",
        padding=conv.padding,
        group=conv.group,
        weight_init=_tensor(scale[:, None, None, None] * _value(conv.weight)),
        has_bias=True,
        bias_init=_tensor(shift),
    )


def _fold_attention(attn: layers.Attention) -> None:
    _fold_scale(attn.attend, attn.proj_q)
    passed_on = _value(attn.proj.weight) @ _bias(attn.proj_v)
    _set(attn.proj, _value(attn.proj.weight), _bias(attn.proj) + passed_on)
    for name in ("proj_k", "proj_v"):
        old = getattr(attn, name)
        new = nn.Dense(old.in_channels, old.out_channels, old.weight.value(), has_bias=False)
        setattr(attn, name, new)


def _fold_scale(attend, linear: nn.Dense, rows: int | None = None) -> None:
    """Move the scale of the scores into the first rows of a Linear; None means all."""
    factor = np.ones(linear.out_channels)
    factor[:rows] = attend.scale
    _set(linear, factor[:, None] * _value(linear.weight), factor * _bias(linear))
    attend.scale = 1.0


def _set(linear: nn.Dense, weight: np.ndarray, bias: np.ndarray) -> None:
    linear.weight.set_data(_tensor(weight))
    linear.bias.set_data(_tensor(bias))


def _bias(linear: nn.Dense) -> np.ndarray:
    return _value(linear.bias)


def _value(parameter: Tensor) -> np.ndarray:
    """Return the values in float64, so that folding rounds only once."""
    return parameter.asnumpy().astype(np.float64)


def _tensor(values: np.ndarray) -> Tensor:
    return Tensor(values.astype(np.float32))
