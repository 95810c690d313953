"""Weights from a file into a network: all of them, or an error that names what doesn't fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image

from src.errors import UserError
from src.weights.checkpoint import read_checkpoint
from src.weights.content import Place
from src.weights.files import read_content
from src.weights.load_report import LoadReport, WeightsMismatch
from src.weights.select import select

logger = logging.getLogger("cvt")

_HEAD, _NORM = "head.", "norm."
_TABLE_ROWS = 20


def read_weights(
    path: str | Path, known: Collection[str] = (), entry: str | None = None
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Read the weights of a file or folder of any kind under our names.

    State of training is left. Of several sets of weights, the moving average is taken.

    Args:
        path: the file or folder.
        known: the parameters' names of the network to load; a CvT's are known anyway.
        entry: the entry or prefix of the weights to take, where there are several sets.

    Returns:
        Arrays by name in the file's type, and a report of what was left and renamed.

    Raises:
        UserError: a file that can't be read, whose names are of no known network, or with several
            sets to choose from.
    """
    report = LoadReport(str(path))

    def choose(found: Mapping[Place, Any]) -> dict[Place, str]:
        done = select(found, known, entry)
        report.naming, report.renamed, report.averaged = done.naming, done.renamed, done.averaged
        report.ignored, report.notes = done.ignored, done.notes
        return done.names

    content = read_content(Path(path), choose)
    report.notes = [*report.notes, *content.notes]
    return content.tensors, report


def load_weights(
    net: nn.Cell,
    path: str | Path,
    strict: bool = True,
    new_head: bool = False,
    entry: str | None = None,
) -> LoadReport:
    """Load a weight file or a folder of Hugging Face's into a network.

    Reads what MindSpore, PyTorch and safetensors write, by content and not by suffix, with our, the
    official or Hugging Face's names under any entry and prefix. Position embeddings are
    interpolated to the network's grid. Float types other than the parameters' are converted.

    Args:
        net: changed only if the file fits, or `strict` is false.
        path: the file or folder.
        strict: raise on anything missing, left over or misshapen. Otherwise load what fits; the
            report tells what did not.
        new_head: a head that does not fit keeps the network's initial values.
        entry: the entry or prefix to take ("ema"), where the file holds several sets of weights;
            by default a moving average.

    Returns:
        What became of every tensor.

    Raises:
        WeightsMismatch: strict, and the file doesn't fit; has the report.
        UserError: a file that can't be read.
    """
    known = {parameter.name for parameter in net.get_parameters()}
    tensors, report = read_weights(path, known, entry)
    load_tensors(net, tensors, report, strict, new_head)
    return report


def load_tensors(
    net: nn.Cell,
    tensors: dict[str, np.ndarray],
    report: LoadReport,
    strict: bool = True,
    new_head: bool = False,
) -> None:
    """As `load_weights`, for what `read_weights` gave; completes the report."""
    parameters = {parameter.name: parameter for parameter in net.get_parameters()}
    tensors = _fit_pos_embeds(net, parameters, tensors, report)
    _compare(parameters, tensors, report)
    for name, old_grid, _ in report.interpolated:
        shape = report.shapes[name][1]
        report.shapes[name] = ((1, math.prod(old_grid), shape[2]), shape)
    if new_head:
        _except_head(report)
    if strict:
        _require_fit(report)
    _assign(parameters, tensors, report)


def load_state(cell: nn.Cell, path: str | Path) -> dict[str, float]:
    """Load every parameter of a training step; returns the numbers saved beside them.

    Raises:
        UserError: an unreadable file, one of weights only, or of another network or recipe.
    """
    tensors = read_checkpoint(path).tensors
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    extra = {n: t.item() for n, t in tensors.items() if n not in parameters and t.ndim == 0}
    if not extra:
        raise UserError(
            f"{path}: holds weights only, no state of a run; give --resume alone for the run's "
            "newest state, or start a new run with --finetune and this file"
        )
    tensors = {name: tensor for name, tensor in tensors.items() if name not in extra}
    report = LoadReport(str(path))
    _compare(parameters, tensors, report)
    _require_fit(report)
    _assign(parameters, tensors, report)
    return extra


def _compare(
    parameters: dict[str, Parameter], tensors: dict[str, np.ndarray], report: LoadReport
) -> None:
    """Sort every name into the report."""
    for name, parameter in parameters.items():
        there = tensors[name].shape if name in tensors else None
        report.shapes[name] = (there, tuple(parameter.shape))
        if there is None:
            report.missing.append(name)
        elif there != tuple(parameter.shape):
            report.mismatched.append((name, there, tuple(parameter.shape)))
        else:
            report.loaded.append(name)
    for name in tensors:
        if name not in parameters:
            report.unexpected.append(name)
            report.shapes[name] = (tensors[name].shape, None)


def _of_head(report: LoadReport) -> list[str]:
    """The names of the head; the last norm belongs to it where the file has neither."""
    missing = {*report.missing}
    norm = [name for name in report.shapes if name.startswith(_NORM)]
    head = [name for name in report.shapes if name.startswith(_HEAD)]
    return norm + head if {*norm, *head} <= missing else head


def _misfits(report: LoadReport) -> set[str]:
    return {*report.missing, *report.unexpected, *(name for name, _, _ in report.mismatched)}


def _except_head(report: LoadReport) -> None:
    """A head of which any part doesn't fit stays as it is initialised, the whole of it."""
    head = _of_head(report)
    if _misfits(report).isdisjoint(head):
        return
    report.new_head = head
    excused = {*head}

    def others(names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in excused]

    report.missing, report.unexpected = others(report.missing), others(report.unexpected)
    report.loaded = others(report.loaded)
    report.mismatched = [row for row in report.mismatched if row[0] not in excused]


def _require_fit(report: LoadReport) -> None:
    """Raise unless everything fits; a table of what does not goes to the log first."""
    complaint = report.complaint()
    if not complaint:
        return
    logger.info("%s", report.table(everything=False, limit=_TABLE_ROWS))
    if _misfits(report) <= {*_of_head(report)}:
        complaint += (
            "; only the head differs: set the file's number of classes, or start with a new head "
            "(new_head=True; train.py --finetune)"
        )
    raise WeightsMismatch(f"{report.path}: does not fit the network: {complaint}", report)


def _assign(
    parameters: dict[str, Parameter], tensors: dict[str, np.ndarray], report: LoadReport
) -> None:
    for name in report.loaded:
        dtype = parameters[name].asnumpy().dtype
        if tensors[name].dtype != dtype:
            report.cast[str(tensors[name].dtype)] += 1
        # assign, because a compiled graph doesn't see set_data; a copy, because files don't align.
        ops.assign(parameters[name], Tensor(np.array(tensors[name], dtype)))


def _fit_pos_embeds(
    net: nn.Cell,
    parameters: dict[str, Parameter],
    tensors: dict[str, np.ndarray],
    report: LoadReport,
) -> dict[str, np.ndarray]:
    """The tensors, with position embeddings of other grids interpolated."""
    tensors = dict(tensors)
    for prefix, cell in net.cells_and_names():
        name = f"{prefix}.pos_embed"
        grid = getattr(cell, "pos_embed_grid", None)
        if grid is None or name not in parameters or name not in tensors:
            continue
        embedding, wanted = tensors[name], tuple(parameters[name].shape)
        if embedding.shape == wanted or embedding.ndim != 3 or embedding.shape[2] != wanted[2]:
            continue
        old_grid = _grid_of(embedding.shape[1], grid)
        if old_grid is not None:
            tensors[name] = interpolate_pos_embed(embedding, old_grid, grid)
            report.interpolated.append((name, old_grid, tuple(grid)))
    return tensors


def _grid_of(tokens: int, like: tuple[int, int]) -> tuple[int, int] | None:
    """The grid of an embedding: square, else of the aspect ratio of another grid, else unknown."""
    edge = math.isqrt(tokens)
    if edge * edge == tokens:
        return edge, edge
    height = max(1, round(math.sqrt(tokens * like[0] / like[1])))
    return (height, tokens // height) if tokens % height == 0 else None


def interpolate_pos_embed(
    embedding: np.ndarray, old_grid: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Bicubic interpolation of a position embedding [1, H * W, C] -> float32 [1, H' * W', C]."""
    channels = embedding.shape[2]
    maps = embedding.astype(np.float32).reshape(*old_grid, channels).transpose(2, 0, 1)  # [C, H, W]
    size = (grid[1], grid[0])
    images = (Image.fromarray(np.ascontiguousarray(each)) for each in maps)
    resized = [np.asarray(image.resize(size, Image.BICUBIC)) for image in images]
    return np.stack(resized, axis=-1).reshape(1, -1, channels)
