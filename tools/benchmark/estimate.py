"""Estimates the memory of a training step on a card and the time of its all-reduce.

Nothing runs. Memory is computed from the network's structure, as the sum of what the step holds at
the end of the forward pass, without a back end's workspace, fragmentation and buffers. Tests
compare the activations with those that a compiled graph keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mindspore import nn

from src.errors import UserError
from src.models.arguments import as_size
from src.models.attention import ScaledDotProductAttention
from src.models.cvt import CvT, Stage
from src.models.layers import Attention, Block

FLOAT32 = 4  # bytes of weights, gradients, moments, averages, norms and softmax
FLASH_STATISTICS = 2 * 8  # float32 numbers that flash_attention_score keeps per query and head
MOMENTS = {"adamw": 2, "sgd": 1}  # numbers per parameter


@dataclass(frozen=True)
class Memory:
    """Bytes on a card at the end of the forward pass."""

    parameters: int
    moments: int
    average: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        parts = (self.parameters, self.moments, self.average, self.gradients, self.activations)
        return sum(parts)


@dataclass(frozen=True)
class Cluster:
    """Bandwidths of a card in bytes per second in each direction.

    Args:
        name: name of the machines.
        cards: cards per node.
        within: bandwidth to the other cards of its node.
        between: bandwidth to cards of other nodes.
    """

    name: str
    cards: int
    within: float
    between: float


# An Ascend 910 server. Within: one HCCS port of 240 Gb/s (Huawei's talk at Hot Chips 31, 2019).
# Between: a card's 100G Ethernet (Huawei's support document EDOC1100164821).
ASCEND_910 = Cluster("Ascend 910, 8 cards per node", 8, within=30e9, between=12.5e9)


def step_memory(
    net: CvT,
    image_size: int | Sequence[int],
    batch_size: int,
    precision: str = "float32",
    optimizer: str = "adamw",
    average: bool = True,
) -> Memory:
    """Estimate the memory of a training step on one card.

    Args:
        net: only shapes are read; see `src.models.uninitialised`.
        image_size: pixels, one number or (H, W).
        batch_size: images on the card.
        precision: precision of Linears and convolutions; below float32 the backward pass also keeps
            a copy of their weights, counted with the activations.
        optimizer: "adamw" or "sgd".
        average: whether there is a moving average of the weights.

    Raises:
        UserError: the network does not accept the size, or is not a CvT.
    """
    if not isinstance(net, CvT):
        raise UserError("memory is estimated for CvT only; set model.name to one of the cvt models")
    trained = sum(p.size for p in net.trainable_params())
    held = sum(p.size for p in net.get_parameters())
    compute = FLOAT32 if precision == "float32" else 2
    cast = [c for _, c in net.cells_and_names() if isinstance(c, (nn.Dense, nn.Conv2d))]
    casts = 0 if compute == FLOAT32 else compute * sum(cell.weight.size for cell in cast)
    return Memory(
        parameters=FLOAT32 * held,
        moments=FLOAT32 * trained * MOMENTS[optimizer],
        average=FLOAT32 * held * average,
        gradients=FLOAT32 * trained,
        activations=batch_size * activation_bytes(net, image_size, compute) + casts,
    )


def activation_bytes(net: CvT, image_size: int | Sequence[int], compute: int = FLOAT32) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, for one image.

    These are the inputs of every convolution, Linear, norm and matrix product; the outputs of
    softmax and sigmoid; both factors of the activation; dropout's masks; and two statistics of each
    norm. Tensors with one number per image or channel are ignored.

    Args:
        net: only shapes are read.
        image_size: pixels, one number or (H, W).
        compute: bytes per number in Linears and convolutions; 4 or 2.
    """
    size = as_size(image_size)
    total, channels = 0, net.in_channels
    for stage, grid in zip((net.stage0, net.stage1, net.stage2), net.grids(size)):
        total += compute * channels * math.prod(size) + _stage(stage, grid, compute)
        size, channels = grid, stage.dim
    return total + (FLOAT32 + compute) * channels + FLOAT32 * net.num_classes


def _norm(tokens: int, dim: int) -> int:
    return FLOAT32 * tokens * (dim + 2)


def _stage(stage: Stage, grid: tuple[int, int], compute: int) -> int:
    """Return the bytes of a stage after the input of its convolution."""
    tokens = math.prod(grid) + stage.has_cls_token
    embedding = _norm(math.prod(grid), stage.dim)
    if stage.pos_drop.rate:
        embedding += FLOAT32 * tokens * stage.dim  # its mask
    return embedding + sum(_block(block, grid, tokens, compute) for block in stage.blocks)


def _block(block: Block, grid: tuple[int, int], tokens: int, compute: int) -> int:
    dim, hidden = block.attn.num_heads * block.attn.head_dim, block.mlp.fc1.out_channels
    drop_rate = block.mlp.drop1.rate
    masks = compute * tokens * (2 * dim + hidden) if drop_rate else 0
    mlp = compute * tokens * (dim + 3 * hidden)  # fc1's input; act's, its sigmoid, fc2's input
    return 2 * _norm(tokens, dim) + _attention(block.attn, grid, tokens, compute) + mlp + masks


def _attention(cell: Attention, grid: tuple[int, int], tokens: int, compute: int) -> int:
    dim, kv_grid, total = cell.num_heads * cell.head_dim, cell.kv_grid(grid), 0
    if cell.qkv_projection == "conv":
        total += compute * dim * math.prod(grid)  # the input of all three convolutions
        total += FLOAT32 * dim * (math.prod(grid) + 2 * math.prod(kv_grid))  # BatchNorms' inputs
    kv_tokens = math.prod(kv_grid) + (tokens - math.prod(grid))
    projections = compute * dim * (tokens + 2 * kv_tokens)
    heads = projections + _product(cell.attend, tokens, kv_tokens, compute)
    return total + projections + heads + compute * tokens * dim  # the last Linear's input


def _product(cell: ScaledDotProductAttention, tokens: int, kv_tokens: int, compute: int) -> int:
    """Return the bytes that the attention product keeps besides q, k and v."""
    if cell.flash:
        output = compute * cell.num_heads * cell.head_dim
        return tokens * (FLOAT32 * FLASH_STATISTICS * cell.num_heads + output)
    casts = 0 if compute == FLOAT32 else compute
    return (FLOAT32 + casts) * cell.num_heads * tokens * kv_tokens


def all_reduce_seconds(size: int, cards: int, cluster: Cluster) -> float:
    """Estimate the time of an all-reduce of `size` bytes, without overlap or latency.

    It uses a ring in each node, then one between the nodes for each card's part. A card must send
    at least 2 (n - 1) / n of its part of the data (Patarasuk and Yuan, 2009).

    Args:
        size: bytes of the gradients.
        cards: total number; whole nodes, or fewer than one node.
        cluster: the bandwidths.
    """
    local = min(cards, cluster.cards)
    nodes = cards // local
    within = 2 * (local - 1) / local * size / cluster.within
    between = 2 * (nodes - 1) / nodes * size / local / cluster.between
    return within + between
