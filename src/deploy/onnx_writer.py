"""Write a network's inference graph as an ONNX file.

Each function mirrors the `construct` of a cell in evaluation mode, after `fuse` has folded the
weights. Shapes: B batch, C channels, N grid tokens, T = N, or 1 + N with a leading class token,
h heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from mindspore import Parameter, nn

from src.deploy.fuse import fuse
from src.deploy.onnx_graph import INPUT, OnnxGraph
from src.errors import UserError
from src.models.cvt import CvT, Stage
from src.models.layers import KERNEL_SIZE, PADDING, Attention
from src.models.resnet import Residual, ResNet
from src.models.vit import VisionTransformer

MAX_BYTES = 2**31 - 2**20  # of a protobuf message, with room for the nodes


def write_onnx(
    net: nn.Cell,
    shape: Sequence[int | None],
    path: Path,
    weight_dtype: str = "float32",
    precision: str = "float32",
) -> None:
    """Write a trained network for inference.

    Args:
        net: a trained network of the registry.
        shape: the float32 input's [B, C, H, W]; None for B lets the file take any batch size.
        path: the file.
        weight_dtype: "float32", or "float16" for the weights of Linears and convolutions.
        precision: "float32", or "float16" for Linears, convolutions and attention products; norms,
            softmax and the residual stream stay float32.

    Raises:
        UserError: the network is not supported, or too large for a single file.
    """
    write = _WRITERS.get(type(net))
    if write is None:
        raise UserError(
            f"--format onnx: {type(net).__name__} is not supported; use --format mindir"
        )
    half = "float16" in (weight_dtype, precision)
    size = sum(p.size for p in net.get_parameters()) * (2 if half else 4)
    if size > MAX_BYTES:
        raise UserError(
            f"--format onnx: {size / 2**30:.1f} GiB of weights exceed the 2 GiB of an ONNX file; "
            "halve them with --weight_dtype float16, or use --format mindir"
        )
    net = fuse(net)
    classes = net.num_classes or _num_features(net)
    graph = OnnxGraph(precision, "float16" if half else "float32")
    feature = write(graph, net, tuple(shape[2:]))  # [B, C]
    if net.num_classes:
        feature = graph.linear(feature, "head", *_affine(net.head))
    model = graph.model(graph.cast(feature, "float32"), shape, classes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _cvt(graph: OnnxGraph, net: CvT, size: tuple[int, int]) -> str:
    x = INPUT
    stages = (net.stage0, net.stage1, net.stage2)
    for i, (stage, patch) in enumerate(zip(stages, net.patches)):
        grid = tuple(_num_windows(edge, *patch) for edge in size)
        with graph.scope(f"stage{i}"):
            x = x if i == 0 else _to_map(graph, x, size, stages[i - 1].dim)
            x = _cvt_stage(graph, stage, x, grid, net.stage2.has_cls_token and i == 2)
        size = grid
    if net.stage2.has_cls_token:
        return _norm(graph, x, "norm", net.norm, single=True)
    return graph.node("ReduceMean", _norm(graph, x, "norm", net.norm), axes=[1], keepdims=0)


def _cvt_stage(
    graph: OnnxGraph, stage: Stage, x: str, grid: tuple[int, int], only_cls: bool
) -> str:
    """Map [B, C_in, H_in, W_in] -> tokens [B, T, C], or the class token [B, C]."""
    with graph.scope("patch_embed"):
        x = _to_tokens(graph, _conv(graph, x, "proj", stage.patch_embed.proj), stage.dim, grid)
        x = _norm(graph, x, "norm", stage.patch_embed.norm)
    if stage.pos_embed_grid is not None:
        x = graph.add(x, graph.constant("pos_embed", stage.pos_embed.asnumpy()))
    if stage.has_cls_token:
        x = _with_cls_token(graph, x, stage.cls_token)
    for j, block in enumerate(stage.blocks):
        alone = only_cls and j == len(stage.blocks) - 1

        def attend(y: str, attn=block.attn, alone: bool = alone) -> str:
            return _attention(graph, attn, y, grid, alone)

        with graph.scope(f"block{j}"):
            x = _block(graph, block, x, attend, _silu, alone)
    return x


def _attention(graph: OnnxGraph, attn: Attention, x: str, grid: tuple, only_cls: bool) -> str:
    """Tokens [B, T, C] -> [B, T, C], or the class token's [B, C]."""
    count, dim = grid[0] * grid[1], attn.num_heads * attn.head_dim
    first = 1 if attn.has_cls_token else 0
    cls = graph.slice_tokens(x, 0, 1) if first else None
    q = k = v = x
    if attn.qkv_projection != "linear":
        tokens = graph.slice_tokens(x, 1, 1 + count) if first else x
        grid_map = _to_map(graph, tokens, grid, dim)
        if attn.qkv_projection == "avg":
            q, (k, count) = tokens, _pool(graph, attn, grid_map, grid)
            v = k
        else:
            if not only_cls:
                q, _ = _depthwise(graph, "conv_proj_q", attn.conv_proj_q.conv, grid_map, grid)
            k, count = _depthwise(graph, "conv_proj_k", attn.conv_proj_k.conv, grid_map, grid)
            v, _ = _depthwise(graph, "conv_proj_v", attn.conv_proj_v.conv, grid_map, grid)
        if first:
            joined = {each: graph.concat(cls, each) for each in dict.fromkeys((k, v))}
            k, v = joined[k], joined[v]
            q = q if only_cls else graph.concat(cls, q)
    q = _first_token(graph, x, dim) if only_cls else q
    q = graph.linear(q, "proj_q", *_affine(attn.proj_q))
    k = graph.linear(k, "proj_k", *_affine(attn.proj_k))
    v = graph.linear(v, "proj_v", *_affine(attn.proj_v))
    queries = None if only_cls else first + grid[0] * grid[1]
    return _attend(graph, attn, q, k, v, queries, first + count)


def _depthwise(graph: OnnxGraph, name: str, conv: nn.Conv2d, x: str, grid: tuple) -> tuple:
    """Map [B, C, H, W] -> tokens [B, N', C], N'."""
    with graph.scope(name):
        small = tuple(_num_windows(edge, KERNEL_SIZE, conv.stride[0], PADDING) for edge in grid)
        x = _conv(graph, x, "conv", conv)
        return _to_tokens(graph, x, conv.out_channels, small), small[0] * small[1]


def _pool(graph: OnnxGraph, attn: Attention, x: str, grid: tuple) -> tuple:
    """Apply the "avg" projection: map [B, C, H, W] -> tokens [B, N', C], N'.

    Engines differ in AveragePool's border, so it is a depthwise convolution with equal weights;
    `AvgProjection` explains the correction.
    """
    dim = attn.num_heads * attn.head_dim
    with graph.scope("pool_kv"):
        (below, rows), (right, columns) = (attn.pool_kv.windows(edge) for edge in grid)
        weight = np.full((dim, 1, KERNEL_SIZE, KERNEL_SIZE), KERNEL_SIZE**-2, np.float32)
        pads = (PADDING, PADDING, below, right)
        x = graph.conv(x, "conv", weight, None, attn.pool_kv.stride, pads, group=dim)
        correction = np.outer(rows, columns)
        if (correction != 1).any():
            factor = graph.constant("correction", correction)
            x = graph.node("Mul", graph.cast(x, "float32"), factor)
        return _to_tokens(graph, x, dim, correction.shape), correction.size


def _attend(graph: OnnxGraph, attn, q: str, k: str, v: str, queries: int | None, keys: int) -> str:
    """Attend: q [B, T, C], or [B, C] if queries is None, k and v [B, T', C] -> shape of q."""
    heads, dim = attn.num_heads, attn.head_dim
    q = graph.reshape(q, -1, queries or 1, heads, dim)
    q = graph.transpose(q, 0, 2, 1, 3)  # [B, h, T, C / h]
    k = graph.transpose(graph.reshape(k, -1, keys, heads, dim), 0, 2, 3, 1)  # [B, h, C / h, T']
    v = graph.transpose(graph.reshape(v, -1, keys, heads, dim), 0, 2, 1, 3)  # [B, h, T', C / h]
    scores = graph.cast(graph.matmul(q, k), "float32")
    x = graph.matmul(graph.node("Softmax", scores, axis=-1), v)
    shape = [heads * dim] if queries is None else [queries, heads * dim]
    x = graph.reshape(graph.transpose(x, 0, 2, 1, 3), -1, *shape)
    return graph.linear(x, "proj", *_affine(attn.proj))


def _block(
    graph: OnnxGraph, block: nn.Cell, x: str, attend: Callable, act: Callable, only_cls: bool
) -> str:
    """x [B, T, C] -> [B, T, C], or the class token's [B, C]."""
    y = _norm(graph, x, "norm1", block.norm1)
    with graph.scope("attn"):
        y = attend(y)
    if only_cls:
        x = _first_token(graph, x, block.attn.num_heads * block.attn.head_dim)
    x = graph.add(x, y)
    y = _norm(graph, x, "norm2", block.norm2, single=only_cls)
    with graph.scope("mlp"):
        y = act(graph, graph.linear(y, "fc1", *_affine(block.mlp.fc1)))
        y = graph.linear(y, "fc2", *_affine(block.mlp.fc2))
    return graph.add(x, y)


def _first_token(graph: OnnxGraph, x: str, dim: int) -> str:
    """[B, T, C] -> [B, C]."""
    return graph.reshape(graph.slice_tokens(x, 0, 1), -1, dim)


def _silu(graph: OnnxGraph, x: str) -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _gelu(graph: OnnxGraph, x: str) -> str:
    """Apply the exact GELU, x / 2 * (1 + erf(x / sqrt 2))."""
    x = graph.cast(x, "float32")
    erf = graph.node("Erf", graph.node("Div", x, graph.constant("sqrt_2", 2**0.5)))
    one = graph.add(erf, graph.constant("one", 1.0))
    return graph.node("Mul", graph.node("Mul", x, one), graph.constant("half", 0.5))


def _vit(graph: OnnxGraph, net: VisionTransformer, size: tuple[int, int]) -> str:
    grid = net.grid(size)
    count = 1 + grid[0] * grid[1]
    with graph.scope("patch_embed"):
        x = _to_tokens(
            graph, _conv(graph, INPUT, "proj", net.patch_embed.proj), net.embed_dim, grid
        )
    x = _with_cls_token(graph, x, net.cls_token)
    x = graph.add(x, graph.constant("pos_embed", net.pos_embed.asnumpy()))
    for j, block in enumerate(net.blocks):
        alone = j == len(net.blocks) - 1

        def attend(y: str, attn=block.attn, alone: bool = alone) -> str:
            weight, bias = (np.split(each, 3) for each in _affine(attn.qkv))
            first = _first_token(graph, y, net.embed_dim) if alone else y
            q, k, v = (
                graph.linear(each, name, weight[i], bias[i])
                for i, (name, each) in enumerate((("q", first), ("k", y), ("v", y)))
            )
            return _attend(graph, attn, q, k, v, None if alone else count, count)

        with graph.scope(f"block{j}"):
            x = _block(graph, block, x, attend, _gelu, alone)
    return _norm(graph, x, "norm", net.norm, single=True)


def _resnet(graph: OnnxGraph, net: ResNet, size: tuple[int, int]) -> str:
    with graph.scope("stem"):
        x = graph.node("Relu", _conv(graph, INPUT, "conv", net.stem.conv))
        if net.pools:
            window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
            x = graph.node("MaxPool", x, **window)
    for i, stage in enumerate(net.stages):
        for j, block in enumerate(stage.blocks):
            with graph.scope(f"stage{i}", f"block{j}"):
                x = _residual(graph, block, x)
    x = graph.node("GlobalAveragePool", graph.cast(x, "float32"))
    return graph.reshape(x, -1, _num_features(net))


def _residual(graph: OnnxGraph, block: Residual, x: str) -> str:
    """x [B, C_in, H, W] -> [B, C, H', W']."""
    y = x
    for i, layer in enumerate(block.layers):
        with graph.scope(f"layer{i}"):
            y = _conv(graph, graph.node("Relu", y) if i else y, "conv", layer.conv)
    if block.projects:
        with graph.scope("shortcut"):
            x = _conv(graph, x, "conv", block.shortcut.conv)
    return graph.node("Relu", graph.add(x, y))


def _with_cls_token(graph: OnnxGraph, x: str, token: Parameter) -> str:
    """Tokens [B, N, C] -> [B, 1 + N, C]; zeros computed from x broadcast the token to the batch."""
    x = graph.cast(x, "float32")
    zeros = graph.node("Mul", graph.slice_tokens(x, 0, 1), graph.constant("zero", 0.0))
    return graph.concat(graph.add(zeros, graph.constant("cls_token", token.asnumpy())), x)


def _conv(graph: OnnxGraph, x: str, name: str, conv: nn.Conv2d) -> str:
    bias = conv.bias.asnumpy() if conv.has_bias else None
    padding = (conv.padding,) * 4 if isinstance(conv.padding, int) else conv.padding
    top, bottom, left, right = padding
    pads = (top, left, bottom, right)
    return graph.conv(x, name, conv.weight.asnumpy(), bias, conv.stride[0], pads, conv.group)


def _norm(graph: OnnxGraph, x: str, name: str, norm: nn.LayerNorm, single: bool = False) -> str:
    gamma, beta = norm.gamma.asnumpy(), norm.beta.asnumpy()
    return graph.layer_norm(x, name, gamma, beta, norm.epsilon, single)


def _to_tokens(graph: OnnxGraph, x: str, dim: int, grid: Sequence[int]) -> str:
    """[B, C, H, W] -> [B, N, C]."""
    return graph.transpose(graph.reshape(x, -1, dim, grid[0] * grid[1]), 0, 2, 1)


def _to_map(graph: OnnxGraph, x: str, grid: Sequence[int], dim: int) -> str:
    """[B, N, C] -> [B, C, H, W]."""
    return graph.reshape(graph.transpose(x, 0, 2, 1), -1, dim, *grid)


def _num_windows(edge: int, kernel: int, stride: int, padding: int) -> int:
    """Return the number of window positions along an edge."""
    return (edge + 2 * padding - kernel) // stride + 1


def _num_features(net: nn.Cell) -> int:
    """Return the number of channels before the head."""
    if isinstance(net, CvT):
        return net.stage2.dim
    if isinstance(net, VisionTransformer):
        return net.embed_dim
    return net.stages[-1].blocks[-1].layers[-1].conv.out_channels


def _affine(linear: nn.Dense) -> tuple[np.ndarray, np.ndarray | None]:
    return linear.weight.asnumpy(), linear.bias.asnumpy() if linear.has_bias else None


_WRITERS = {CvT: _cvt, VisionTransformer: _vit, ResNet: _resnet}
