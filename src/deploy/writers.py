"""Write exported files in each format."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.build import set_precision
from src.deploy.fuse import fuse
from src.errors import UserError

_ENGINES = {"mindir": ("mindspore",), "onnx": ("onnxruntime", "openvino"), "air": ()}


def check_format(file_format: str, batch_size: int | None, device: str) -> None:
    """Check that a format can be written and checked here, before any work.

    Raises:
        UserError: AIR without Ascend or a batch size; ONNX without onnx or an engine that runs it.
    """
    if file_format == "onnx":
        if importlib.util.find_spec("onnx") is None:
            raise UserError("--format onnx: needs onnx: pip install onnx")
        if not installed_engines(file_format):
            raise UserError(
                "--format onnx: no engine to check the file: pip install onnxruntime, or "
                "pip install openvino"
            )
    if file_format == "air" and device != "Ascend":
        raise UserError(
            "--format air: only the Ascend backend writes AIR: run this command on a host with an "
            "Ascend card and CANN, or export mindir or onnx here"
        )
    if file_format == "air" and batch_size is None:
        raise UserError("--batch_size dynamic: an AIR file has a fixed batch size; give a number")


def installed_engines(file_format: str) -> list[str]:
    """Return the installed engines that run files of this format."""
    return [e for e in _ENGINES[file_format] if importlib.util.find_spec(e) is not None]


def write_model(
    net: nn.Cell,
    shape: Sequence[int | None],
    path: Path,
    file_format: str,
    weight_dtype: str = "float32",
    precision: str = "float32",
) -> None:
    """Write a trained network for inference, graph and weights in one file.

    Args:
        net: a float32 network of the registry in evaluation mode; it is not changed.
        shape: the float32 input's [B, C, H, W]; None for B lets the file take any batch size.
        path: the file, with the format's suffix.
        file_format: "mindir", "onnx" or "air".
        weight_dtype: "float32", or "float16" for the weights of Linears and convolutions, which are
            cast to float32 before use.
        precision: "float32", or "float16" for Linears, convolutions and attention products; norms,
            softmax and the residual stream stay float32.

    Raises:
        UserError: the network can't be written in this format.
        OSError: the file can't be written.
    """
    if file_format == "onnx":
        from src.deploy.onnx_writer import write_onnx  # needs onnx

        write_onnx(net, shape, path, weight_dtype, precision)
    else:
        net = set_precision(fuse(net), precision)
        if weight_dtype == "float16":
            _store_half(net, precision)
        _write_by_mindspore(net, shape, path, file_format)


def _store_half(net: nn.Cell, precision: str) -> None:
    for _, cell in net.cells_and_names():
        if isinstance(cell, (nn.Dense, nn.Conv2d)):
            cell.weight.set_dtype(ms.float16)
            cell.to_float(getattr(ms, precision))


def _write_by_mindspore(
    net: nn.Cell, shape: Sequence[int | None], path: Path, file_format: str
) -> None:
    example = (
        Tensor(shape=shape, dtype=ms.float32)
        if shape[0] is None
        else Tensor(np.zeros(shape, np.float32))
    )
    # MindSpore rejects paths with spaces or non-ASCII letters, which TMPDIR may have.
    plain = re.fullmatch(r"[A-Za-z0-9/_.-]+", tempfile.gettempdir())
    with tempfile.TemporaryDirectory(prefix="cvt-export-", dir=None if plain else "/tmp") as folder:
        temporary = Path(folder) / f"model{path.suffix}"
        try:
            ms.export(net, example, file_name=str(temporary), file_format=file_format.upper())
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "no reason")
            raise UserError(
                f"MindSpore {ms.__version__} can't write this network as {file_format}: {reason}"
            ) from error
        if not temporary.is_file():
            raise UserError(
                f"{path}: the weights exceed MindSpore's 1 GiB per MINDIR; halve them with "
                "--weight_dtype float16, or use --format onnx"
            )
        shutil.move(temporary, path)
