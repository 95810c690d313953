"""Export of a checkpoint to a file for deployment, compared with it before the file counts."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype

from src.config import Config
from src.data import Preprocessing, eval_batches
from src.deploy.engines import Run, open_model
from src.deploy.formats import onnx_opset, require, write_model
from src.deploy.fuse import Rewrites, fuse
from src.errors import UserError
from src.files import replacing, write_json
from src.recipe import (
    build_model,
    build_preprocessing,
    open_split,
    resolve_classes,
    set_precision,
    without_flash_attention,
)
from src.weights import load_weights, sha256_of

logger = logging.getLogger("cvt")
CHECKED_IMAGES = 16
CHECKED_BATCHES = (1, 3, 12)  # of a file that takes any number


@dataclass(frozen=True)
class ExportOptions:
    """How a file is written.

    Args:
        file_format: "mindir", "onnx" or "air".
        batch_size: images the file takes at once; None lets it take any number.
        weight_dtype: "float32", or "float16" for Linears' and convolutions' weights; these are
            cast up before they are used, so that the file needs no float16 arithmetic.
        rewrites: for inference; None writes the network as it was trained.
        tolerance: largest difference from the checkpoint's logits, as a share of the largest of
            these where that exceeds 1; None takes the format's.
    """

    file_format: str = "mindir"
    batch_size: int | None = 1
    weight_dtype: str = "float32"
    rewrites: Rewrites | None = Rewrites()
    tolerance: float | None = None

    def largest_difference(self, precision: str) -> float:
        """What the check allows; measured: 4e-6, with float16 weights 3e-3."""
        if self.tolerance is not None:
            return self.tolerance
        if self.weight_dtype == "float16" or precision != "float32":
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
    if config.model.num_classes is None:
        config = resolve_classes(config, open_split(config, "val"))
    net = build_model(without_flash_attention(config))
    logger.info("%s", load_weights(net, checkpoint))
    net.set_train(False)
    preprocessing = build_preprocessing(config)
    shape = (options.batch_size, 3, *preprocessing.image_size)
    exported = _inference_network(net, config.runtime.precision, options)
    try:
        with replacing(output) as partial:
            write_model(exported, shape, partial, options.file_format)
            if options.file_format == "air":
                logger.info("an AIR file can't be loaded back by MindSpore, so it was not checked")
            else:
                images = _images(config, preprocessing)
                tolerance = options.largest_difference(config.runtime.precision)
                _check(net, open_model(partial), images, options.batch_size, tolerance)
            _describe(config, checkpoint, partial, output, options, preprocessing)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from error
    size = output.stat().st_size / 2**20
    logger.info("wrote %s (%.1f MiB) and %s.json", output, size, output.name)


def _inference_network(net: nn.Cell, precision: str, options: ExportOptions) -> nn.Cell:
    if options.rewrites is not None:
        net = set_precision(fuse(net, options.rewrites), precision)
    if options.weight_dtype == "float16":
        net = copy.deepcopy(net) if options.rewrites is None else net
        for _, cell in net.cells_and_names():
            if isinstance(cell, (nn.Dense, nn.Conv2d)):
                cell.weight.set_dtype(mstype.float16)
                cell.to_float(getattr(mstype, precision))
    return net


def _describe(
    config: Config,
    checkpoint: Path,
    written: Path,
    output: Path,
    options: ExportOptions,
    preprocessing: Preprocessing,
) -> None:
    """Write beside an exported file what its user must know; null in a shape is any number."""
    rewrites = dataclasses.asdict(options.rewrites) if options.rewrites else {}
    description = {
        "model": config.model.name,
        "format": options.file_format,
        "input_shape": [options.batch_size, 3, *preprocessing.image_size],
        "input_dtype": "float32",
        "preprocessing": preprocessing.to_dict(),
        "class_names": config.data.class_names,
        "weight_dtype": options.weight_dtype,
        "rewrites": [name for name, made in rewrites.items() if made],
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_of(checkpoint),
        "mindspore": ms.__version__,
    }
    if options.file_format == "onnx":
        description["opset"] = onnx_opset(written)
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


def _check(
    net: nn.Cell, run: Run, images: np.ndarray, batch_size: int | None, tolerance: float
) -> None:
    """Compare the written file's logits with the checkpoint's.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    expected = _logits(lambda batch: net(Tensor(batch)).asnumpy(), images, 4)
    if batch_size is None:
        first, second = np.cumsum(CHECKED_BATCHES)[:2]
        parts = np.split(images, [first, second])
        found = np.concatenate([run(part) for part in parts if len(part)])
    else:
        found = _logits(run, images, batch_size)
    difference, largest = float(np.abs(expected - found).max()), float(np.abs(expected).max())
    agreement = 100 * float((expected.argmax(1) == found.argmax(1)).mean())
    logger.info(
        "checked on %d images: largest difference of the logits %.1e (they reach %.1f), "
        "top-1 agrees on %.1f %%",
        len(images), difference, largest, agreement,
    )  # fmt: skip
    allowed = tolerance * max(1.0, largest)
    if not difference <= allowed:
        raise UserError(
            f"the exported logits differ by {difference:.1e} from the checkpoint's, "
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
