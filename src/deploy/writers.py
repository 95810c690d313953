"""Exported files: how each format is written."""

from __future__ import annotations

import importlib.util
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

CHECKING_ENGINES = {"mindir": ("mindspore",), "onnx": ("onnxruntime", "openvino"), "air": ()}


def require(file_format: str, batch_size: int | None, device: str) -> None:
    """Refuse a format that can't be written or checked here, before any work.

    Raises:
        UserError: no Ascend backend for AIR; no onnx package, or no engine that runs ONNX.
    """
    if file_format == "onnx":
        if importlib.util.find_spec("onnx") is None:
            raise UserError("--format onnx: is written by the onnx package: pip install onnx")
        if not checking_engines(file_format):
            raise UserError(
                "--format onnx: no engine to check the file: pip install onnxruntime, or "
                "pip install openvino"
            )
    if file_format == "air" and device != "Ascend":
        raise UserError(
            "--format air: AIR is written by the Ascend backend only: run this command on a host "
            "with an Ascend card and CANN, or export mindir or onnx here"
        )
    if file_format == "air" and batch_size is None:
        raise UserError("--batch_size dynamic: an AIR file has one batch size; give a number")


def checking_engines(file_format: str) -> list[str]:
    """The engines installed here that run files of this format."""
    return [e for e in CHECKING_ENGINES[file_format] if importlib.util.find_spec(e) is not None]


def write_model(
    net: nn.Cell,
    shape: Sequence[int | None],
    path: Path,
    file_format: str,
    weight_dtype: str = "float32",
    precision: str = "float32",
) -> None:
    """Write a trained network for inference, its graph and weights in one file.

    Args:
        net: a float32 network of the registry in evaluation mode; it is left as it is.
        shape: of the float32 input [B, C, H, W]; None for B lets the file take any batch.
        path: of the file; its suffix is the format's.
        file_format: "mindir", "onnx" or "air".
        weight_dtype: "float32", or "float16" for the weights of Linears and convolutions, which are
            cast up before they are used.
        precision: "float32", or "float16" for Linears, convolutions and attention products; norms,
            softmax and the residual stream stay float32.

    Raises:
        UserError: this network can't be written so.
        OSError: the place can't be written.
    """
    if file_format == "onnx":
        from src.deploy.onnx_writer import write_onnx

        write_onnx(net, shape, path, weight_dtype, precision)
    else:
        net = set_precision(fuse(net), precision)
        if weight_dtype == "float16":
            _halve_weights(net, precision)
        _write_by_mindspore(net, shape, path, file_format)


def _halve_weights(net: nn.Cell, precision: str) -> None:
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
    with tempfile.TemporaryDirectory(prefix="cvt-export-") as folder:
        # Aside, because MindSpore refuses paths with spaces, umlauts and the like.
        aside = Path(folder) / f"model{path.suffix}"
        try:
            ms.export(net, example, file_name=str(aside), file_format=file_format.upper())
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), "no reason")
            raise UserError(
                f"MindSpore {ms.__version__} can't write this network as {file_format}: {reason}"
            ) from error
        if not aside.is_file():
            raise UserError(
                f"{path}: the weights exceed the 1 GiB that MindSpore writes into one MINDIR; "
                "halve them with --weight_dtype float16, or take --format onnx"
            )
        shutil.move(aside, path)
