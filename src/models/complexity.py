"""Counts parameters and multiply-accumulates (MACs) of a network from its cells and their shapes.

One MAC is one multiplication and one addition. The "FLOPs" of the CvT paper (tables 3 and 5) are
MACs and include the attention products q k^T and weights v, which are listed separately here. As
usual, norms, softmax, activations, biases, pooling and sums are not counted.

The network does not run, so CvT-W24 at 384 px (194 GMACs) takes milliseconds: a rule for each
composite cell passes the token grid through the cells and reads the sizes of their weights. A layer
without a rule raises an error, and tests compare the counts with recorded calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mindspore import Parameter, nn

from src.errors import UserError
from src.models.arguments import as_size
from src.models.cvt import CvT, Stage
from src.models.layers import Attention
from src.models.resnet import ResNet
from src.models.vit import VisionTransformer

_RUNNING_STATISTICS = ("moving_mean", "moving_variance")


@dataclass(frozen=True)
class StageComplexity:
    """Parameters and MACs of one stage for one image.

    `grid` is the stage's output (H, W) in tokens, None for the head; `parameters` are trained ones,
    without BatchNorm's running statistics; the rest are MACs.
    """

    name: str
    grid: tuple[int, int] | None
    parameters: int
    convolution_macs: int
    linear_macs: int
    attention_macs: int

    @property
    def total_macs(self) -> int:
        """Sum of convolutions, Linears and attention products."""
        return self.convolution_macs + self.linear_macs + self.attention_macs

    def to_dict(self) -> dict[str, str | int | list[int]]:
        """Return plain values for JSON; without `grid` if it is None."""
        grid = {} if self.grid is None else {"grid": list(self.grid)}
        return {
            "name": self.name,
            **grid,
            "parameters": self.parameters,
            "convolution_macs": self.convolution_macs,
            "linear_macs": self.linear_macs,
            "attention_macs": self.attention_macs,
            "total_macs": self.total_macs,
        }


@dataclass(frozen=True)
class Complexity:
    """The stages in order; the last entry, "head", covers everything after them."""

    stages: tuple[StageComplexity, ...]

    @property
    def total(self) -> StageComplexity:
        """The sums over the stages, named "total"; the paper gives parameters and total_macs."""
        names = ("parameters", "convolution_macs", "linear_macs", "attention_macs")
        sums = {name: sum(getattr(stage, name) for stage in self.stages) for name in names}
        return StageComplexity("total", None, **sums)

    def to_dict(self) -> dict[str, list | dict]:
        """Return plain values for JSON: the list `stages`, and `total`."""
        return {"stages": [stage.to_dict() for stage in self.stages], "total": self.total.to_dict()}

    def __str__(self) -> str:
        """Return an aligned table; MACs in units of 10^9 (G), or 10^6 (M) for small networks."""
        unit, size = ("G", 1e9) if self.total.total_macs >= 1e9 else ("M", 1e6)
        kinds = (f"{unit}MACs: conv", "linear", "attention", "total")
        rows = [["stage", "output", "parameters", *kinds]]
        for row in (*self.stages, self.total):
            macs = (row.convolution_macs, row.linear_macs, row.attention_macs, row.total_macs)
            grid = "" if row.grid is None else f"{row.grid[0]} x {row.grid[1]}"
            rows.append(
                [row.name, grid, f"{row.parameters:,}", *(f"{count / size:.3f}" for count in macs)]
            )
        return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def complexity(net: nn.Cell, image_size: int | Sequence[int]) -> Complexity:
    """Count a network's parameters and MACs for one image.

    Args:
        net: a network of `src.models.create_model`. Only shapes are read, so creating it under
            `uninitialised()` saves the time and memory of initialisation.
        image_size: pixels, one number or (H, W).

    Raises:
        UserError: the network does not accept the size.
        TypeError: there is no rule for the network or a layer in it.
    """
    rule = _RULES.get(type(net))
    if rule is None:
        raise TypeError(f"no rule for a {type(net).__name__}; add one to {__name__}")
    stages, visited = rule(net, image_size)
    for name, cell in net.cells_and_names():
        if isinstance(getattr(cell, "weight", None), Parameter) and id(cell) not in visited:
            raise TypeError(f"no rule for {name}, a {type(cell).__name__}; add one to {__name__}")
    return Complexity(stages)


@dataclass
class _Count:
    """MACs of a stage so far, and the ids of the counted cells."""

    convolution: int = 0
    linear: int = 0
    attention: int = 0
    visited: set[int] = field(default_factory=set)

    def add_convolution(self, cell: nn.Conv2d, grid: tuple[int, int]) -> tuple[int, int]:
        """Count a convolution over (H, W) and return its output's (H', W')."""
        if cell.pad_mode != "pad" or not isinstance(cell.padding, int):
            raise TypeError(f"no rule for a convolution with padding {cell.padding!r}")
        grid = tuple(
            (edge + 2 * cell.padding - dilation * (kernel - 1) - 1) // stride + 1
            for edge, kernel, stride, dilation in zip(
                grid, cell.kernel_size, cell.stride, cell.dilation
            )
        )
        self.convolution += cell.weight.size * math.prod(grid)
        self.visited.add(id(cell))
        return grid

    def add_linear(self, cell: nn.Dense, tokens: int) -> None:
        """Count a Linear over a number of tokens."""
        self.linear += cell.weight.size * tokens
        self.visited.add(id(cell))

    def to_stage(self, name: str, grid: tuple[int, int] | None, parameters: int) -> StageComplexity:
        """Return the counts as a stage of the result."""
        macs = (self.convolution, self.linear, self.attention)
        return StageComplexity(name, grid, parameters, *macs)


_Counted = tuple[tuple[StageComplexity, ...], set[int]]


def _cvt(net: CvT, image_size: int | Sequence[int]) -> _Counted:
    """Return the stages of a CvT and the ids of the counted cells."""
    net.grids(image_size)  # raises if the strides do not accept the size
    grid = as_size(image_size)
    rows, visited = [], set()
    for i, stage in enumerate((net.stage0, net.stage1, net.stage2)):
        count = _Count(visited=visited)
        grid = _stage(stage, grid, count)
        if stage.pos_embed_grid not in (None, grid):
            raise UserError(
                f"image_size {image_size}: the position embedding of stage{i} has a grid of "
                f"{stage.pos_embed_grid}, this size gives {grid}; create the model with it"
            )
        rows.append(count.to_stage(f"stage{i}", grid, _parameters(stage)))
    return _with_head(net, rows, visited)


def _with_head(net: nn.Cell, rows: Sequence[StageComplexity], visited: set[int]) -> _Counted:
    """Append a stage for the head and all remaining parameters."""
    count = _Count(visited=visited)
    if net.num_classes:
        count.add_linear(net.head, 1)
    rest = _parameters(net) - sum(row.parameters for row in rows)
    return (*rows, count.to_stage("head", None, rest)), visited


def _stage(stage: Stage, size: tuple[int, int], count: _Count) -> tuple[int, int]:
    """Count a stage for a map of `size` (H, W); returns its grid of tokens."""
    grid = count.add_convolution(stage.patch_embed.proj, size)
    tokens = stage.has_cls_token + math.prod(grid)
    for block in stage.blocks:
        _attention(block.attn, grid, count)
        count.add_linear(block.mlp.fc1, tokens)
        count.add_linear(block.mlp.fc2, tokens)
    return grid


def _attention(cell: Attention, grid: tuple[int, int], count: _Count) -> None:
    """Count the projections and both products of an attention over a grid of tokens (H, W)."""
    if cell.qkv_projection == "conv":
        for projection in (cell.conv_proj_q, cell.conv_proj_k, cell.conv_proj_v):
            count.add_convolution(projection.conv, grid)
    tokens = cell.has_cls_token + math.prod(grid)
    kv_tokens = cell.has_cls_token + math.prod(cell.kv_grid(grid))
    count.add_linear(cell.proj_q, tokens)
    count.add_linear(cell.proj_k, kv_tokens)
    count.add_linear(cell.proj_v, kv_tokens)
    count.add_linear(cell.proj, tokens)
    count.attention += 2 * cell.num_heads * cell.head_dim * tokens * kv_tokens


def _vit(net: VisionTransformer, image_size: int | Sequence[int]) -> _Counted:
    """Return the stages of a ViT and the ids of the counted cells."""
    grid = net.grid(image_size)  # raises if the patches do not divide the size
    if as_size(image_size) != net.image_size:
        raise UserError(
            f"image_size {image_size}: the position embedding is for {net.image_size}; "
            "create the model with this size"
        )
    tokens = 1 + math.prod(grid)
    embedding, blocks = _Count(), _Count()
    embedding.add_convolution(net.patch_embed.proj, as_size(image_size))
    for block in net.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            blocks.add_linear(linear, tokens)
        blocks.attention += 2 * block.attn.num_heads * block.attn.head_dim * tokens**2
    own = net.cls_token.size + net.pos_embed.size
    rows = (
        embedding.to_stage("embedding", grid, _parameters(net.patch_embed) + own),
        blocks.to_stage("blocks", grid, _parameters(net.blocks)),
    )
    return _with_head(net, rows, embedding.visited | blocks.visited)


def _resnet(net: ResNet, image_size: int | Sequence[int]) -> _Counted:
    """Return the stages of a ResNet and the ids of the counted cells."""
    visited: set[int] = set()
    count = _Count(visited=visited)
    grid = count.add_convolution(net.stem.conv, net.check_size(image_size))
    if net.pools:
        grid = tuple((edge - 1) // 2 + 1 for edge in grid)
    rows = [count.to_stage("stem", grid, _parameters(net.stem))]
    for i, stage in enumerate(net.stages):
        count = _Count(visited=visited)
        for block in stage.blocks:
            if block.projects:
                count.add_convolution(block.shortcut.conv, grid)
            for layer in block.layers:
                grid = count.add_convolution(layer.conv, grid)
        rows.append(count.to_stage(f"stage{i}", grid, _parameters(stage)))
    return _with_head(net, rows, visited)


_RULES = {CvT: _cvt, VisionTransformer: _vit, ResNet: _resnet}


def _parameters(cell: nn.Cell) -> int:
    return sum(
        parameter.size
        for parameter in cell.get_parameters()
        if not parameter.name.endswith(_RUNNING_STATISTICS)
    )
