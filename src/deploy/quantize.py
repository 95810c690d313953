"""int8 for CPUs: an ONNX file's Linears and convolutions on 8-bit integers, by onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from src.build import open_split
from src.config import Config
from src.data import Preprocessing, Source, eval_batches
from src.data.subset import Subset
from src.deploy.engines import open_model
from src.errors import UserError

logger = logging.getLogger("cvt")
CALIBRATION_IMAGES = 256
EVALUATED_IMAGES = 1000
LARGEST_LOSS = 1.5  # points of top-1, beyond which a warning says so


def require_quantizer() -> None:
    """Check that onnxruntime is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("--quantize int8: is done by onnxruntime: pip install onnxruntime")


def quantize(
    path: Path, quantized: Path, config: Config, preprocessing: Preprocessing, batch_size: int
) -> dict[str, float | int | str]:
    """Write a float32 ONNX file's int8 twin, and compare the accuracy of both.

    Static, in QDQ form: activations as uint8 by the least and greatest value seen on training
    images, weights as int8 for each output channel. Products of two activations, softmax, norms and
    the residual stream stay float32.

    Args:
        path: the float32 file.
        quantized: the file to write.
        config: of the run, whose images calibrate and compare.
        preprocessing: of an image.
        batch_size: images that the file takes at once.

    Returns:
        For the description: type, calibration_images, images, and in percent top1_float32 and
        top1_int8.

    Raises:
        UserError: the data is not at hand.
    """
    from onnxruntime import quantization as ort

    splits = {}
    for split, count in (("train", CALIBRATION_IMAGES), ("val", EVALUATED_IMAGES)):
        try:
            splits[split] = _spread(open_split(config, split), count)
        except UserError as error:
            raise UserError(
                f"--quantize int8: calibrates on training images and compares on held-out ones, "
                f"which are not at hand: {error}"
            ) from error

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = _batches(splits["train"], preprocessing, batch_size)

        def get_next(self) -> dict[str, np.ndarray] | None:
            images, _, _ = next(self.batches, (None, None, 0))
            return None if images is None else {"images": images}

    handlers = list(logging.root.handlers)
    logging.disable(logging.WARNING)  # advice on preparing a file that needs none
    try:
        ort.quantize_static(
            str(path),
            str(quantized),
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=_layers(path),
        )
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers  # it adds one, which would print our lines twice
    before, after = (_top1(file, splits["val"], preprocessing, batch_size)
                     for file in (path, quantized))  # fmt: skip
    logger.info(
        "int8: calibrated on %d training images; top-1 on %d held-out images %.2f %% in float32, "
        "%.2f %% in int8",
        len(splits["train"]), len(splits["val"]), before, after,
    )  # fmt: skip
    if before - after > LARGEST_LOSS:
        logger.warning("int8 loses %.2f points of top-1: think twice", before - after)
    return {
        "type": "int8",
        "calibration_images": len(splits["train"]),
        "images": len(splits["val"]),
        "top1_float32": before,
        "top1_int8": after,
    }


def _layers(path: Path) -> list[str]:
    """Names of the nodes that multiply by weights: Linears and convolutions."""
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]


def _spread(source: Source, count: int) -> Source:
    """At most `count` images, evenly over the split, which may be sorted by class."""
    if not len(source):
        raise UserError(f"{source.title}: no image in it")
    count = min(count, len(source))
    indices = np.arange(count) * len(source) // count
    return Subset(source, indices, source.labels[indices], source.class_names)


def _batches(
    source: Source, preprocessing: Preprocessing, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield images, labels and their number; the last batch is filled up with zeros."""
    batches = eval_batches(source, preprocessing.operations(source.encoded), size)
    for images, labels in batches.iterate(output_numpy=True):
        missing = size - len(images)
        yield np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))), labels, len(labels)


def _top1(path: Path, source: Source, preprocessing: Preprocessing, size: int) -> float:
    """Top-1 accuracy of a file in onnxruntime, in percent."""
    run = open_model(path, "onnxruntime")
    right = sum(
        int((run(images)[:number].argmax(1) == labels).sum())
        for images, labels, number in _batches(source, preprocessing, size)
    )
    return 100 * right / len(source)
