"""Quantize the Linears and convolutions of an ONNX file to int8 for CPUs with onnxruntime."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from src.config import Config
from src.data import Preprocessing, Source, create_eval_loader
from src.data.imagenet_labels import check_class_order
from src.data.transforms import pad_batch
from src.deploy.engines import import_optional, open_model
from src.errors import UserError, shorten
from src.splits import open_checked, open_split, resolve_classes

logger = logging.getLogger("cvt")
CALIBRATION_IMAGES = 256
EVALUATION_IMAGES = 1000
MAX_DROP = 1.5  # points of top-1; a larger loss is warned of


def check_quantizer() -> None:
    """Raise UserError if onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("--quantize int8: needs onnxruntime: pip install onnxruntime")


def quantize(
    path: Path,
    quantized: Path,
    config: Config,
    preprocessing: Preprocessing,
    batch_size: int,
    run: Path | None = None,
) -> dict[str, float | int | str]:
    """Quantize a float32 ONNX file to int8 and compare the accuracy of both.

    Static quantization in QDQ form: uint8 activations by their range on training images, int8
    weights per output channel. Products of two activations, softmax, norms and the residual stream
    stay float32.

    Args:
        path: the float32 file.
        quantized: the file to write.
        config: the run's configuration; its images are used.
        preprocessing: of an image.
        batch_size: images per batch.
        run: the run's folder, which has the index of its images.

    Returns:
        For the description: type, calibration_images, images, and top1_float32 and top1_int8 in
        per cent.

    Raises:
        UserError: the images are not available, or their classes are not the network's.
    """
    training, held_out = _open_samples(config, run)
    _quantize_file(path, quantized, _batches(training, preprocessing, batch_size))
    before, after = (_top1(file, held_out, preprocessing, batch_size)
                     for file in (path, quantized))  # fmt: skip
    logger.info(
        "int8: calibrated on %d training images; top-1 on %d held-out images %.2f %% in float32, "
        "%.2f %% in int8",
        len(training), len(held_out), before, after,
    )  # fmt: skip
    if before - after > MAX_DROP:
        logger.warning("int8 loses %.2f points of top-1", before - after)
    return {
        "type": "int8",
        "calibration_images": len(training),
        "images": len(held_out),
        "top1_float32": before,
        "top1_int8": after,
    }


def _open_samples(config: Config, run: Path | None) -> tuple[Source, Source]:
    """Open the training images for the calibration and the held-out ones for the comparison.

    Raises:
        UserError: as `quantize`.
    """
    # data.broken_share is for whole splits; of so few images, any share may be broken.
    data = dataclasses.replace(config.data, broken="skip", broken_share=1.0)
    config = dataclasses.replace(config, data=data)
    splits = {}
    for split, count in (("train", CALIBRATION_IMAGES), ("val", EVALUATION_IMAGES)):
        try:
            sample = _sample_evenly(open_split(config, split), count)
            splits[split] = open_checked(
                config, split, run=run, keep=False, source=sample, sample=True
            )
            if split == "val":  # labels must mean the network's outputs, as in an evaluation
                given = bool(config.data.class_names or config.data.classes)
                check_class_order(sample, given, outputs=config.model.num_classes)
                resolve_classes(config, sample)
        except UserError as error:
            raise UserError(
                f"--quantize int8: needs the training images for calibration and the held-out "
                f"ones for comparison: {error}"
            ) from error
    return splits["train"], splits["val"]


def _quantize_file(path: Path, quantized: Path, batches: Iterator[tuple]) -> None:
    """Write `quantized`; the ranges of activations are those of `batches`, as `_batches` yields."""
    import_optional("onnxruntime")  # without its telemetry
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            images, _, _ = next(batches, (None, None, 0))
            return None if images is None else {"images": images}

    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    # Hides advice to preprocess the file, which it does not need.
    logging.disable(max(disabled, logging.WARNING))
    try:
        ort.quantize_static(
            str(path),
            str(quantized),
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=_weighted_nodes(path),
        )
    except UserError:
        raise
    except Exception as error:  # onnx, protobuf and onnxruntime raise many kinds on a full disk
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
        raise UserError(
            f"--quantize int8: onnxruntime failed ({reason}); is there space beside --output?"
        ) from error
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers  # onnxruntime adds one, which would repeat our lines


def _weighted_nodes(path: Path) -> list[str]:
    """Return the names of the nodes with weights: Linears and convolutions."""
    import onnx

    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights
    ]


def _sample_evenly(source: Source, count: int) -> Source:
    """Select at most `count` images, evenly over a split that may be sorted by class."""
    if not len(source):
        raise UserError(f"{source.title}: no image in it")
    count = min(count, len(source))
    return source.subset(np.arange(count) * len(source) // count)


def _batches(
    source: Source, preprocessing: Preprocessing, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield images padded to full batches, labels and the number of labels."""
    batches = create_eval_loader(source, preprocessing.operations(source.encoded), size)
    for images, labels in batches.iterate(output_numpy=True):
        yield pad_batch(images, size), labels, len(labels)


def _top1(path: Path, source: Source, preprocessing: Preprocessing, size: int) -> float:
    """Return the top-1 accuracy of a file in onnxruntime, in per cent."""
    run = open_model(path, "onnxruntime")
    right = sum(
        int((run(images)[:number].argmax(1) == labels).sum())
        for images, labels, number in _batches(source, preprocessing, size)
    )
    return 100 * right / len(source)
