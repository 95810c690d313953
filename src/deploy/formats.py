"""Exported files: how each format is written."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.errors import UserError

INPUT, OUTPUT = "images", "logits"  # names of the ONNX graph's ends


def require(file_format: str, batch_size: int | None, device: str) -> None:
    """Refuse a format that can't be written or checked here, before any work.

    Raises:
        UserError: no Ascend backend for AIR, no onnxruntime for ONNX.
    """
    if file_format == "onnx":
        _onnxruntime()
    if file_format == "air" and device != "Ascend":
        raise UserError(
            "--format air: AIR is written by the Ascend backend only: run this command on a host "
            "with an Ascend card and CANN, or export mindir or onnx here"
        )
    if file_format == "air" and batch_size is None:
        raise UserError("--batch_size dynamic: an AIR file has one batch size; give a number")


def write_model(net: nn.Cell, shape: tuple[int | None, ...], path: Path, file_format: str) -> None:
    """Write a network's graph and weights into one file.

    Args:
        net: in evaluation mode.
        shape: of the float32 input; None is any number.
        path: of the file; its suffix is the format's.
        file_format: "mindir", "onnx" or "air".

    Raises:
        UserError: MindSpore can't write this network so.
        OSError: the place can't be written.
    """
    example = (
        Tensor(shape=shape, dtype=ms.float32)
        if shape[0] is None
        else Tensor(np.zeros(shape, np.float32))
    )
    with tempfile.TemporaryDirectory(prefix="cvt-export-") as folder:
        # Aside, because MindSpore refuses paths with spaces, umlauts and the like.
        aside = Path(folder) / f"model{path.suffix}"
        try:
            if file_format == "onnx":
                _write_onnx(net, example, aside)
            else:
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


def _write_onnx(net: nn.Cell, example: Tensor, path: Path) -> None:
    try:
        from mindspore.onnx import export
    except ImportError:  # MindSpore 2.7
        ms.export(net, example, file_name=str(path), file_format="ONNX")
    else:
        export(net, example, file_name=str(path), input_names=[INPUT], output_names=[OUTPUT])


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError:
        raise UserError("ONNX files are run by onnxruntime: pip install onnxruntime") from None
    return onnxruntime


def onnx_opset(path: Path) -> int:
    """The version of the operator set of an ONNX file, from its protobuf header fields.

    ModelProto.opset_import is field 8, in it the version field 2 (onnx.proto, ONNX 1.x).
    """
    data = memoryview(path.read_bytes())
    for field, content in _protobuf(data):
        if field == 8:
            return next(value for key, value in _protobuf(content) if key == 2)
    raise ValueError(f"{path}: names no operator set")


def _protobuf(data: memoryview):
    """Yield (field, value) of a message: an int, or a view of what has a length."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        value = varint()
        if tag & 7 == 2:
            value, at = data[at : at + value], at + value
        yield tag >> 3, value
