"""Export of a checkpoint to a file for deployment, compared with it before the file counts."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.build import build_model, build_preprocessing, open_split, resolve_classes
from src.config import Config
from src.data import Preprocessing, eval_batches
from src.deploy.engines import Run, open_model
from src.deploy.quantize import quantize, require_quantizer
from src.deploy.writers import checking_engines, require, write_model
from src.errors import UserError
from src.files import replacing, sha256_of, write_json
from src.weights import load_weights, weight_files

logger = logging.getLogger("cvt")
CHECKED_IMAGES = 16
CHECKED_BATCHES = (1, 3, 12)  # of a file that takes any number


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written.

    Args:
        file_format: "mindir", "onnx" or "air".
        batch_size: images the file takes at once; None lets it take any number.
        weight_dtype, precision: as `formats.write_model` takes them, whatever the run's were.
        tolerance: largest difference from the checkpoint's logits, as a share of the largest of
            these where that exceeds 1; None takes the format's.
        quantize: whether Linears and convolutions become int8 after that check (onnx, float32).
    """

    file_format: str = "mindir"
    batch_size: int | None = 1
    weight_dtype: str = "float32"
    precision: str = "float32"
    tolerance: float | None = None
    quantize: bool = False

    def largest_difference(self) -> float:
        """What the check allows; measured: 4e-6, with float16 3e-3."""
        if self.tolerance is not None:
            return self.tolerance
        if "float16" in (self.weight_dtype, self.precision):
            return 2e-2
        return 1e-5 if self.file_format == "mindir" else 1e-4


def export(
    config: Config, checkpoint: Path, output: Path, options: ExportOptions, device: str
) -> None:
    """Write `output` and `output`.json.

    Args:
        config: of the checkpoint's run.
        checkpoint: the weights.
        output: the file to write.
        options: how.
        device: what `runtime.setup` returned.

    Raises:
        UserError: a checkpoint that doesn't fit, a format that can't be written here, or logits
            that differ from the checkpoint's; then nothing is left behind.
    """
    require(options.file_format, options.batch_size, device)
    if options.quantize:
        require_quantizer()
    if config.model.num_classes is None:
        config = resolve_classes(config, open_split(config, "val"))
    # What the run computed in says nothing about where the file will run.
    runtime = dataclasses.replace(config.runtime, precision="float32", flash_attention=False)
    net = build_model(dataclasses.replace(config, runtime=runtime))
    logger.info("%s", load_weights(net, checkpoint))
    net.set_train(False)
    preprocessing = build_preprocessing(config)
    shape = (options.batch_size, 3, *preprocessing.image_size)
    try:
        with replacing(output) as partial:
            write_model(
                net, shape, partial, options.file_format, options.weight_dtype, options.precision
            )
            _check_file(net, partial, _images(config, preprocessing), options)
            quantization = None
            if options.quantize:
                floating = partial.rename(partial.with_name("float32.onnx"))
                size = options.batch_size or CHECKED_IMAGES
                quantization = quantize(floating, partial, config, preprocessing, size)
            _describe(config, checkpoint, output, options, preprocessing, quantization)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from error
    size = output.stat().st_size / 2**20
    logger.info("wrote %s (%.1f MiB) and %s.json", output, size, output.name)


def _describe(
    config: Config,
    checkpoint: Path,
    output: Path,
    options: ExportOptions,
    preprocessing: Preprocessing,
    quantization: dict | None,
) -> None:
    """Write beside an exported file what its user must know; null in a shape is any number."""
    description = {
        "model": config.model.name,
        "format": options.file_format,
        "input_shape": [options.batch_size, 3, *preprocessing.image_size],
        "input_dtype": "float32",
        "preprocessing": preprocessing.to_dict(),
        "class_names": config.data.class_names,
        "weight_dtype": options.weight_dtype,
        "precision": options.precision,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_of(*weight_files(checkpoint)),
        "mindspore": ms.__version__,
    }
    if quantization is not None:
        description["quantization"] = quantization
    if options.file_format == "onnx":
        from src.deploy.onnx_graph import OPSET

        description["opset"] = OPSET
    write_json(description, f"{output}.json")


def _images(config: Config, preprocessing: Preprocessing) -> np.ndarray:
    """Held-out images to compare on; noise where the data is not at hand."""
    try:
        source = open_split(config, "val")
        operations = preprocessing.operations(source.encoded)
        batches = eval_batches(source, operations, min(CHECKED_IMAGES, len(source)))
        images, _ = next(batches.iterate(output_numpy=True))
    except UserError as error:
        logger.info("compared on noise, because the data is not at hand (%s)", error)
        shape = (CHECKED_IMAGES, 3, *preprocessing.image_size)
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return images


def _check_file(net: nn.Cell, path: Path, images: np.ndarray, options: ExportOptions) -> None:
    """Compare a written file's logits with the checkpoint's, in each engine that is installed.

    Raises:
        UserError: an engine refuses the file, or the logits differ by more than the tolerance.
    """
    engines = checking_engines(options.file_format)
    if not engines:
        logger.info("an AIR file can't be loaded back by MindSpore, so it was not checked")
        return
    expected = _logits(lambda batch: net(Tensor(batch)).asnumpy(), images, 4)
    for engine in engines:
        run = open_model(path, engine)
        _compare(expected, run, images, options.batch_size, options.largest_difference(), engine)


def _compare(
    expected: np.ndarray,
    run: Run,
    images: np.ndarray,
    batch_size: int | None,
    tolerance: float,
    engine: str,
) -> None:
    """Compare a file's logits with the expected ones; Raises as `_check_file`."""
    if batch_size is None:
        first, second = np.cumsum(CHECKED_BATCHES)[:2]
        parts = np.split(images, [first, second])
        found = np.concatenate([run(part) for part in parts if len(part)])
    else:
        found = _logits(run, images, batch_size)
    difference, largest = float(np.abs(expected - found).max()), float(np.abs(expected).max())
    agreement = 100 * float((expected.argmax(1) == found.argmax(1)).mean())
    logger.info(
        "checked in %s on %d images: largest difference of the logits %.1e (they reach %.1f), "
        "top-1 agrees on %.1f %%",
        engine, len(images), difference, largest, agreement,
    )  # fmt: skip
    allowed = tolerance * max(1.0, largest)
    if not difference <= allowed:
        raise UserError(
            f"the exported logits differ by {difference:.1e} from the checkpoint's in {engine}, "
            f"more than {allowed:.0e}: not kept; allow more with --tolerance, or report a fault"
        )


def _logits(run: Run, images: np.ndarray, size: int) -> np.ndarray:
    """In batches of one size, the last one filled up."""
    found = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
        found.append(run(padded)[: len(batch)])
    return np.concatenate(found)
