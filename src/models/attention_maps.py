"""What the class token looks at: the attention weights of the last stage, and where they lie.

The grid of keys is coarser than that of queries (`kv_stride`), and a token does not stand in the
middle of the pixels that an even division of the image would give it: the convolutions put token
(0, 0) of CvT-13 on pixel (1, 1) and its neighbour 16 pixels further. Both are followed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.errors import UserError
from src.models.cvt import CvT
from src.models.layers import Attention


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of the last stage's blocks, first block first, as `attention_maps` reads it.

    Shapes: h heads, H x W the grid of queries, H' x W' that of keys; the class token comes first.

    Args:
        from_cls: of each block, the class token's weights in each head, float32 [B, h, 1 + H'W'].
        mean: of each block, all weights in the mean over heads, float32 [B, 1 + HW, 1 + H'W'].
        queries: rows [H] and columns [W] of the image, in pixels, where the queries are centred.
        keys: rows [H'] and columns [W'] where the keys are centred.
        image_size: (height, width) in pixels.
    """

    from_cls: tuple[np.ndarray, ...]
    mean: tuple[np.ndarray, ...]
    queries: tuple[np.ndarray, np.ndarray]
    keys: tuple[np.ndarray, np.ndarray]
    image_size: tuple[int, int]

    def heads(self) -> tuple[np.ndarray, np.ndarray]:
        """The class token's attention in the last block.

        Returns:
            To the keys of the image, [B, h, H', W'], and to itself, [B, h]. A head's sum is 1.
        """
        weights = self.from_cls[-1]
        maps = weights[..., 1:].reshape(*weights.shape[:2], *(len(axis) for axis in self.keys))
        return maps, weights[..., 0]

    def rollout(self) -> tuple[np.ndarray, np.ndarray]:
        """Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928) from the class token.

        How much of what enters the stage at each token reaches the class token at its end, if every
        block passed on half of its input and half of its attention's mean over heads. Weights on
        keys are carried back to the tokens by `spread`.

        Returns:
            To the tokens of the image, [B, H, W], and to the class token, [B]. An image's sum is 1.
        """
        rows, columns = (spread(*axes) for axes in zip(self.keys, self.queries))
        grid, kv_grid = (tuple(len(axis) for axis in axes) for axes in (self.queries, self.keys))
        share = np.zeros(self.mean[-1].shape[:2], np.float32)  # [B, 1 + HW]
        share[:, 0] = 1.0
        for weights in reversed(self.mean):
            on_keys = np.einsum("bt,btk->bk", share, weights)  # [B, 1 + H'W']
            tokens = rows.T @ on_keys[:, 1:].reshape(-1, *kv_grid) @ columns  # [B, H, W]
            attended = np.concatenate((on_keys[:, :1], tokens.reshape(len(tokens), -1)), axis=1)
            share = 0.5 * share + 0.5 * attended
        return share[:, 1:].reshape(-1, *grid), share[:, 0]

    def even(self) -> AttentionMaps:
        """The maps of a network that looks everywhere alike, to compare with.

        Its rollout is not flat: tokens at the border are near fewer keys, or near only one.
        """

        def even(blocks: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            return tuple(np.full_like(weights, 1 / weights.shape[-1]) for weights in blocks)

        return replace(self, from_cls=even(self.from_cls), mean=even(self.mean))

    def to_image(self, maps: np.ndarray) -> np.ndarray:
        """Maps on either grid, [..., H, W] or [..., H', W'], to pixels, [..., height, width].

        Linear between the centres, and held beyond the outermost ones. Values are kept, so sums
        are not.
        """
        for axes in (self.keys, self.queries):
            if maps.shape[-2:] == tuple(len(axis) for axis in axes):
                pixels = (np.arange(edge) for edge in self.image_size)
                rows, columns = (interpolation(*pair) for pair in zip(axes, pixels))
                return rows @ maps @ columns.T
        raise ValueError(f"maps {maps.shape} lie on neither of the two grids")


def attention_maps(net: nn.Cell, images: Tensor) -> AttentionMaps:
    """Run a network on images and read the attention weights of its last stage.

    Needs PyNative mode, `mindspore.set_context(mode=mindspore.PYNATIVE_MODE)`: hooks read the
    inputs of each attention, and a compiled graph has none. The network stays as it is.

    Args:
        net: a CvT with a class token, in inference mode.
        images: float32 [B, C, height, width].

    Raises:
        UserError: a network without a class token, or graph mode.
    """
    if not isinstance(net, CvT) or not net.stage2.has_cls_token:
        raise UserError(
            "attention maps start at the class token of a CvT, and this network has none "
            "(model.cls_token) or is no CvT"
        )
    if ms.get_context("mode") != ms.PYNATIVE_MODE:
        raise UserError("attention maps need PyNative mode: ms.set_context(mode=ms.PYNATIVE_MODE)")
    from_cls, mean = [], []

    def record(cell: Attention, inputs: tuple) -> None:
        weights = attention_weights(cell, *inputs[:3]).asnumpy()
        from_cls.append(weights[:, :, 0])
        mean.append(weights.mean(axis=1))

    attentions = [block.attn for block in net.stage2.blocks]
    hooks = [cell.register_forward_pre_hook(record) for cell in attentions]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    image_size = tuple(images.shape[2:])
    grid = net.grids(image_size)[-1]
    kv_grids = [_key_positions(attentions[0], edge) for edge in grid]
    queries = tuple(token_centres(net.patches, np.arange(edge)) for edge in grid)
    keys = tuple(token_centres(net.patches, positions) for positions in kv_grids)
    return AttentionMaps(tuple(from_cls), tuple(mean), queries, keys, image_size)


def attention_weights(cell: Attention, x: Tensor, height: int, width: int) -> Tensor:
    """The weights that an attention gives its values: softmax(q k^T / sqrt(C)), rows sum to 1.

    Args:
        cell: of a network in PyNative mode.
        x: the cell's input, tokens [B, T, C] on a grid of height x width.

    Returns:
        float32 [B, h, T, T'].
    """
    q, k, _ = cell._project(x, height, width)
    q, k = cell._heads(cell.proj_q(q)), cell._heads(cell.proj_k(k))
    return cell.attend.weights(q, k)


def _key_positions(cell: Attention, edge: int) -> np.ndarray:
    """Where along an axis of `edge` queries the keys are centred, in queries."""
    if cell.qkv_projection == "linear":
        return np.arange(edge)
    if cell.qkv_projection == "avg":
        stride, count = cell.pool_kv.stride, len(cell.pool_kv._windows(edge)[1])
    else:
        stride = cell.conv_proj_k.conv.stride[0]
        count = (edge - 1) // stride + 1  # a kernel of 3 and a padding of 1
    return stride * np.arange(count)


def token_centres(patches: Sequence[tuple[int, int, int]], positions: np.ndarray) -> np.ndarray:
    """The pixel under the middle of each token's window, along one axis.

    Args:
        patches: (size, stride, padding) of the embeddings that the image goes through.
        positions: of tokens of the last embedding, counted from 0.

    Returns:
        float32, of the same shape; pixel 0 is the first one's centre.
    """
    for size, stride, padding in reversed(patches):
        positions = positions * stride + (size - 1) / 2 - padding
    return positions.astype(np.float32)


def interpolation(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The matrix [points, centres] of linear interpolation, held beyond the first and last centre.

    Rows sum to 1.
    """
    unit = np.eye(len(centres), dtype=np.float32)
    return np.stack([np.interp(points, centres, row) for row in unit], axis=1).astype(np.float32)


def spread(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The matrix [H', H] that hands the weight on a key back to the tokens around it, on one axis.

    A choice of ours, as rollout was defined for equal grids: at stride 2 a key gives half of its
    weight to the token under its centre and a quarter to each neighbour, the three that its
    convolution reads; at stride 1, all to its own token. It is the transpose of `interpolation`
    with rows that sum to 1, so rollout loses no weight, and it is even about the centre: cells of
    2 x 2 tokens would move the map by half a token in each block.
    """
    matrix = interpolation(keys, queries).T
    return matrix / matrix.sum(axis=1, keepdims=True)
