"""Attention maps of the class token in the last stage, mapped to image pixels.

The grid of keys is coarser than that of queries (`kv_stride`), and a token is not centred in an
equal division of the image: the convolutions centre token (0, 0) of CvT-13 on pixel (1, 1) and its
neighbour 16 pixels further. This module accounts for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.errors import UserError
from src.models.cvt import CvT
from src.models.layers import Attention, Block


@dataclass(frozen=True)
class AttentionMaps:
    """The attention weights of the last stage's blocks, first block first.

    Shapes: h heads, H x W the grid of queries, H' x W' that of keys; the class token comes first.

    Args:
        from_cls: the class token's weights of each block, float32 [B, h, 1 + H'W'].
        mean: all weights of each block, averaged over heads, float32 [B, 1 + HW, 1 + H'W'].
        queries: pixel rows [H] and columns [W] of the queries' centres.
        keys: pixel rows [H'] and columns [W'] of the keys' centres.
        image_size: (height, width) in pixels.
    """

    from_cls: tuple[np.ndarray, ...]
    mean: tuple[np.ndarray, ...]
    queries: tuple[np.ndarray, np.ndarray]
    keys: tuple[np.ndarray, np.ndarray]
    image_size: tuple[int, int]

    def heads(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the class token's attention in the last block.

        Returns:
            Weights of the image's keys [B, h, H', W'] and of itself [B, h]. A head's sum is 1.
        """
        weights = self.from_cls[-1]
        maps = weights[..., 1:].reshape(*weights.shape[:2], *(len(axis) for axis in self.keys))
        return maps, weights[..., 0]

    def rollout(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928) of the class token.

        It estimates how much each of the stage's input tokens contributes to the class token at the
        end, assuming that a block passes on half of its input and half of its attention, averaged
        over heads. `spread` maps weights of keys back to the tokens.

        Returns:
            Weights of the image's tokens [B, H, W] and of the class token [B]. An image's sum is 1.
        """
        rows, columns = (spread(*axes) for axes in zip(self.keys, self.queries))
        grid, kv_grid = (tuple(len(axis) for axis in axes) for axes in (self.queries, self.keys))
        fraction = np.zeros(self.mean[-1].shape[:2], np.float32)  # [B, 1 + HW]
        fraction[:, 0] = 1.0
        for weights in reversed(self.mean):
            on_keys = np.einsum("bt,btk->bk", fraction, weights)  # [B, 1 + H'W']
            tokens = rows.T @ on_keys[:, 1:].reshape(-1, *kv_grid) @ columns  # [B, H, W]
            attended = np.concatenate((on_keys[:, :1], tokens.reshape(len(tokens), -1)), axis=1)
            fraction = 0.5 * fraction + 0.5 * attended
        return fraction[:, 1:].reshape(-1, *grid), fraction[:, 0]

    def uniform(self) -> AttentionMaps:
        """Return the maps of a network with uniform attention, for comparison.

        Its rollout is not flat, because tokens at the border are near fewer keys.
        """

        def uniform(blocks: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            return tuple(np.full_like(weights, 1 / weights.shape[-1]) for weights in blocks)

        return replace(self, from_cls=uniform(self.from_cls), mean=uniform(self.mean))

    def to_image(self, maps: np.ndarray) -> np.ndarray:
        """Interpolate maps [..., H, W] or [..., H', W'] to pixels [..., height, width].

        Linear between the centres, constant beyond the outermost ones. This preserves values, not
        sums.
        """
        for axes in (self.keys, self.queries):
            if maps.shape[-2:] == tuple(len(axis) for axis in axes):
                pixels = (np.arange(edge) for edge in self.image_size)
                rows, columns = (interpolation(*pair) for pair in zip(axes, pixels))
                return rows @ maps @ columns.T
        raise ValueError(f"maps {maps.shape} match neither grid")


def attention_maps(net: nn.Cell, images: Tensor) -> AttentionMaps:
    """Run a network on images and record the attention weights of its last stage.

    This needs PyNative mode, `mindspore.set_context(mode=mindspore.PYNATIVE_MODE)`: hooks read the
    inputs of each block, and a compiled graph runs no hooks. The network is not changed.

    Args:
        net: a CvT with a class token, in inference mode.
        images: float32 [B, C, height, width].

    Raises:
        UserError: the network has no class token, or the mode is graph mode.
    """
    if not isinstance(net, CvT) or not net.stage2.has_cls_token:
        raise UserError(
            "attention maps need a CvT with a class token (cls_token); this network has none"
        )
    if ms.get_context("mode") != ms.PYNATIVE_MODE:
        raise UserError("attention maps need PyNative mode: ms.set_context(mode=ms.PYNATIVE_MODE)")
    from_cls, mean = [], []

    def record(block: Block, inputs: tuple) -> None:
        x, height, width = inputs[:3]
        weights = attention_weights(block.attn, block.norm1(x), height, width).asnumpy()
        from_cls.append(weights[:, :, 0])
        mean.append(weights.mean(axis=1))

    hooks = [block.register_forward_pre_hook(record) for block in net.stage2.blocks]
    try:
        net(images)
    finally:
        for hook in hooks:
            hook.remove()
    image_size = tuple(images.shape[2:])
    grid = net.grids(image_size)[-1]
    kv_grids = [_key_positions(net.stage2.blocks[0].attn, edge) for edge in grid]
    queries = tuple(token_centres(net.patches, np.arange(edge)) for edge in grid)
    keys = tuple(token_centres(net.patches, positions) for positions in kv_grids)
    return AttentionMaps(tuple(from_cls), tuple(mean), queries, keys, image_size)


def attention_weights(cell: Attention, x: Tensor, height: int, width: int) -> Tensor:
    """Compute the attention weights softmax(q k^T / sqrt(C)); rows sum to 1.

    Args:
        cell: an attention of a network in PyNative mode.
        x: normalised tokens [B, T, C] on a grid of height x width.

    Returns:
        float32 [B, h, T, T'].
    """
    q, k, _ = cell.project(x, height, width)
    q, k = cell.split_heads(cell.proj_q(q)), cell.split_heads(cell.proj_k(k))
    return cell.attend.weights(q, k)


def _key_positions(cell: Attention, edge: int) -> np.ndarray:
    """Return the keys' centres along an axis of `edge` queries, in units of queries."""
    if cell.qkv_projection == "linear":
        return np.arange(edge)
    is_pooled = cell.qkv_projection == "avg"
    stride = cell.pool_kv.stride if is_pooled else cell.conv_proj_k.conv.stride[0]
    return stride * np.arange(cell.kv_grid((edge,))[0])


def token_centres(patches: Sequence[tuple[int, int, int]], positions: np.ndarray) -> np.ndarray:
    """Return the pixel at the centre of each token's window along one axis.

    Args:
        patches: (size, stride, padding) of the successive embeddings.
        positions: tokens of the last embedding, counted from 0.

    Returns:
        float32 of the same shape; 0 is the centre of the first pixel.
    """
    for size, stride, padding in reversed(patches):
        positions = positions * stride + (size - 1) / 2 - padding
    return positions.astype(np.float32)


def interpolation(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the matrix [points, centres] of linear interpolation, constant beyond the ends.

    Rows sum to 1.
    """
    unit = np.eye(len(centres), dtype=np.float32)
    return np.stack([np.interp(points, centres, row) for row in unit], axis=1).astype(np.float32)


def spread(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the matrix [H', H] that maps a key's weight to the tokens around it along one axis.

    Rollout was defined for equal grids, so this is our choice. At stride 2, half of a key's weight
    goes to the token at its centre and a quarter to each neighbour, the three tokens that its
    convolution reads; at stride 1, all of it goes to its own token. The matrix is the transpose of
    `interpolation` with rows that sum to 1, so rollout loses no weight. It is symmetric: cells of
    2 x 2 tokens would shift the map by half a token in each block.
    """
    matrix = interpolation(keys, queries).T
    return matrix / matrix.sum(axis=1, keepdims=True)
