"""Load a weight file into a network, completely or with an error that names what does not fit."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image

from src.errors import UserError
from src.weights.checkpoint import own_parameters
from src.weights.content import KeyPath
from src.weights.files import read_content
from src.weights.load_report import LoadReport, WeightsMismatch
from src.weights.names import HUGGING_FACE
from src.weights.origin import run_settings, warn_other_settings
from src.weights.select import select
from src.weights.torch_pickle import FLOAT8

logger = logging.getLogger("cvt")

_HEAD, _NORM = "head.", "norm."
_TABLE_ROWS = 20
_GELU_NOTE = (
    "computed with QuickGELU, as Microsoft's published weights were trained; weights trained with "
    "transformers were trained with GELU, so their results differ a little"
)


def read_weights(
    path: str | Path, known: Collection[str] = (), entry: str | None = None
) -> tuple[dict[str, np.ndarray], LoadReport]:
    """Read the weights of a file or folder of any supported format under our names.

    Training state is skipped. If there are several sets of weights, the moving average is read.

    Args:
        path: the file or folder.
        known: parameter names of the network to load; CvT's names are always known.
        entry: the entry or prefix to read if there are several sets of weights.

    Returns:
        Arrays by name in the file's dtype, and a report of what was skipped and renamed.

    Raises:
        UserError: the file cannot be read, its names belong to no known network, or `entry` is
            needed to choose between sets of weights.
    """
    path = os.path.expanduser(path)
    report = LoadReport(str(path))

    def choose(tensors: Mapping[KeyPath, Any]) -> dict[KeyPath, str]:
        chosen = select(tensors, known, entry)
        report.naming, report.renamed = chosen.naming, chosen.renamed
        report.averaged, report.ignored = chosen.averaged, chosen.ignored
        report.notes = chosen.notes
        return chosen.names

    content = read_content(Path(path), choose)
    report.notes = [*report.notes, *content.notes]
    if report.naming == HUGGING_FACE:
        report.notes.append(_GELU_NOTE)
    return content.tensors, report


def load_weights(
    net: nn.Cell,
    path: str | Path,
    strict: bool = True,
    new_head: bool = False,
    entry: str | None = None,
) -> LoadReport:
    """Load a weight file or a Hugging Face folder into a network.

    Reads files of MindSpore, PyTorch and safetensors, detected by content, with our, the official
    or Hugging Face's names under any entry and prefix. Position embeddings are interpolated to the
    network's grid. Other dtypes are converted to the parameters'.

    Args:
        net: changed only if the file fits or `strict` is False.
        path: the file or folder.
        strict: raise if anything is missing, unexpected or of another shape. Otherwise load what
            fits; the report lists the rest.
        new_head: a head that does not fit keeps the network's initial values.
        entry: the entry or prefix to load, such as "ema", if the file holds several sets of
            weights; by default the moving average.

    Returns:
        The outcome for every tensor.

    Raises:
        WeightsMismatch: `strict`, and the file does not fit; has the report.
        UserError: the file cannot be read.
    """
    tensors, report = read_weights(path, own_parameters(net), entry)
    if report.naming == HUGGING_FACE:
        warn_other_settings(path, net)
    load_tensors(net, tensors, report, strict, new_head)
    return report


def load_tensors(
    net: nn.Cell,
    tensors: dict[str, np.ndarray],
    report: LoadReport,
    strict: bool = True,
    new_head: bool = False,
) -> None:
    """Load the result of `read_weights` as `load_weights` does, and complete the report."""
    parameters = own_parameters(net)
    tensors = _fit_pos_embeds(net, parameters, tensors, report)
    _compare(parameters, tensors, report)
    for name, old_grid, _ in report.interpolated:
        shape = report.shapes[name][1]
        report.shapes[name] = ((1, math.prod(old_grid), shape[2]), shape)
    if new_head:
        _exclude_head(report)
    if strict:
        _require_fit(report)
    for name in report.loaded:
        _require_float(name, tensors[name], report.path)
    _assign(parameters, tensors, report)


def load_state(cell: nn.Cell, tensors: dict[str, np.ndarray], path: str | Path) -> None:
    """Set every parameter of a training step from the tensors of a file.

    Raises:
        WeightsMismatch: they are of another network or recipe; nothing is set.
    """
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    report = LoadReport(str(path))
    _compare(parameters, tensors, report)
    _require_fit(report)
    _assign(parameters, tensors, report)


def _compare(
    parameters: dict[str, Parameter], tensors: dict[str, np.ndarray], report: LoadReport
) -> None:
    """Compare names and shapes, and enter every name into the report."""
    for name, parameter in parameters.items():
        in_file = tensors[name].shape if name in tensors else None
        in_net = tuple(parameter.shape)
        report.shapes[name] = (in_file, in_net)
        if in_file is None:
            report.missing.append(name)
        elif in_file != in_net:
            report.mismatched.append((name, in_file, in_net))
        else:
            report.loaded.append(name)
    for name in tensors:
        if name not in parameters:
            report.unexpected.append(name)
            report.shapes[name] = (tensors[name].shape, None)


def _head_names(report: LoadReport) -> list[str]:
    """Return the head's names, with the final norm's if the file has neither head nor norm."""
    missing = {*report.missing}
    norm = [name for name in report.shapes if name.startswith(_NORM)]
    head = [name for name in report.shapes if name.startswith(_HEAD)]
    return norm + head if {*norm, *head} <= missing else head


def _exclude_head(report: LoadReport) -> None:
    """Keep the whole head's initial values if any part of it does not fit."""
    head = _head_names(report)
    if report.misfits().isdisjoint(head):
        return
    report.new_head = head
    for names in (report.missing, report.unexpected, report.loaded):
        names[:] = [name for name in names if name not in head]
    report.mismatched = [row for row in report.mismatched if row[0] not in head]


def _require_fit(report: LoadReport) -> None:
    """Raise unless everything fits, after logging a table of what does not.

    Raises:
        WeightsMismatch: something is missing, unexpected or of another shape.
    """
    misfits = report.describe_misfits()
    if not misfits:
        return
    logger.info("%s", report.table(everything=False, limit=_TABLE_ROWS))
    if report.misfits() <= {*_head_names(report)}:
        misfits += (
            "; only the head differs: set model.num_classes to the file's, or start with a new "
            "head (new_head=True; train.py --finetune)"
        )
    raise WeightsMismatch(f"{report.path}: does not fit the network: {misfits}", report)


def _require_float(name: str, values: np.ndarray, path: str | Path) -> None:
    """Raise UserError for other types than floats, infinity, NaN, and what float32 can't hold."""
    if values.dtype.kind != "f":
        kind = "float8" if values.dtype == FLOAT8 else str(values.dtype)
        kind += ", such as quantized weights" if values.dtype.kind in "iu" else ""
        raise UserError(f"{path}: {name} holds {kind}; save float16 or float32")
    if not np.isfinite(values).all():
        raise UserError(
            f"{path}: {name} has infinity or NaN, as after a diverged training or an overflow in "
            "float16; give other weights"
        )
    if values.dtype == np.float64:
        largest = np.abs(values).max(initial=0)
        if largest > np.finfo(np.float32).max:
            raise UserError(f"{path}: {name} reaches {largest:.1e}, more than float32 holds")


def _assign(
    parameters: dict[str, Parameter], tensors: dict[str, np.ndarray], report: LoadReport
) -> None:
    for name in report.loaded:
        parameter = parameters[name]
        dtype = np.dtype(str(parameter.dtype).lower())
        if tensors[name].dtype != dtype:
            report.cast[str(tensors[name].dtype)] += 1
        value = Tensor(np.array(tensors[name], dtype))  # a copy: a file's arrays may be unaligned
        if parameter.has_init:  # `assign` would initialise it first
            parameter.set_data(value)
        else:
            ops.assign(parameter, value)  # a compiled graph ignores set_data


def _fit_pos_embeds(
    net: nn.Cell,
    parameters: dict[str, Parameter],
    tensors: dict[str, np.ndarray],
    report: LoadReport,
) -> dict[str, np.ndarray]:
    """Return the tensors with position embeddings interpolated to the network's grids."""
    tensors = dict(tensors)
    saved: dict[str, tuple[int, int]] | None = None
    assumed: list[str] = []
    for prefix, cell in net.cells_and_names():
        name = f"{prefix}.pos_embed"
        grid = getattr(cell, "pos_embed_grid", None)
        if grid is None or name not in parameters or name not in tensors:
            continue
        embedding, wanted = tensors[name], tuple(parameters[name].shape)
        if embedding.ndim != 3 or embedding.shape[2] != wanted[2]:
            continue
        saved = _saved_grids(net, report.path) if saved is None else saved
        tokens, old_grid = embedding.shape[1], saved.get(prefix)
        if old_grid is None or math.prod(old_grid) != tokens:
            old_grid = _assume_grid(tokens, grid)
            unsure = old_grid != grid or (_is_square(tokens) and grid[0] != grid[1])
            if old_grid is not None and unsure:
                assumed.append(f"{old_grid[0]} x {old_grid[1]}")
        if old_grid not in (None, grid):
            tensors[name] = interpolate_pos_embed(embedding, old_grid, grid)
            report.interpolated.append((name, old_grid, tuple(grid)))
    if assumed:
        report.notes.append(
            f"position embeddings: assumed to be of {', '.join(assumed)} tokens, because no "
            "config.yaml beside the weights has their image size"
        )
    return tensors


def _saved_grids(net: nn.Cell, path: str) -> dict[str, tuple[int, int]]:
    """Return the token grid of each stage at the image size of the weights' run, if it is known."""
    try:
        settings = run_settings(path)
        known = settings is not None and hasattr(net, "grids")
        grids = net.grids(settings.model.image_size) if known else []
    except UserError:  # another program's config.yaml
        grids = []
    return {f"stage{stage}": grid for stage, grid in enumerate(grids)}


def _is_square(tokens: int) -> bool:
    return math.isqrt(tokens) ** 2 == tokens


def _assume_grid(tokens: int, like: tuple[int, int]) -> tuple[int, int] | None:
    """Return the likely grid of `tokens` positions, or None.

    A network's own weights must load unchanged, so as many positions as in its grid `like` have
    that grid. Otherwise a square number has a square grid, and others `like`'s aspect ratio.
    """
    if tokens == math.prod(like):
        return like
    if _is_square(tokens):
        return math.isqrt(tokens), math.isqrt(tokens)
    height = max(1, round(math.sqrt(tokens * like[0] / like[1])))
    return (height, tokens // height) if tokens % height == 0 else None


def interpolate_pos_embed(
    embedding: np.ndarray, old_grid: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray:
    """Interpolate a position embedding bicubically: [1, H * W, C] -> float32 [1, H' * W', C]."""
    channels = embedding.shape[2]
    maps = embedding.astype(np.float32).reshape(*old_grid, channels).transpose(2, 0, 1)  # [C, H, W]
    size = (grid[1], grid[0])
    images = (Image.fromarray(np.ascontiguousarray(each)) for each in maps)
    resized = [np.asarray(image.resize(size, Image.BICUBIC)) for image in images]
    return np.stack(resized, axis=-1).reshape(1, -1, channels)
