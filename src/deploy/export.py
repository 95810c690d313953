"""Export of a checkpoint to a file for deployment, compared with it before the file counts."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.config import Config
from src.data import Preprocessing, eval_batches
from src.errors import UserError
from src.recipe import (
    build_model,
    build_preprocessing,
    open_split,
    resolve_classes,
    without_flash_attention,
)
from src.reporting.figures import write_json
from src.weights import load_weights, make_readable, sha256_of

logger = logging.getLogger("cvt")
TOLERANCE = 1e-5  # of the logits; the exported graph runs the same float32 operators
CHECKED_IMAGES = 16


def export(
    config: Config,
    checkpoint: Path,
    output: Path,
    file_format: str,
    batch_size: int | None,
    device: str,
) -> None:
    """Write `output` and `output`.json.

    Args:
        config: of the checkpoint's run.
        checkpoint: the weights.
        output: the file to write.
        file_format: "mindir", or "air" on an Ascend host.
        batch_size: images the file takes at once; None lets it take any number.
        device: what `runtime.setup` returned.

    Raises:
        UserError: a checkpoint that doesn't fit, a format that can't be written here, or logits
            that differ from the checkpoint's; then nothing is left behind.
    """
    if file_format == "air":
        _require_ascend(output, device)
    if config.model.num_classes is None:
        config = resolve_classes(config, open_split(config, "val"))
    net = build_model(without_flash_attention(config))
    logger.info("%s", load_weights(net, checkpoint))
    net.set_train(False)
    preprocessing = build_preprocessing(config)
    shape = (batch_size, 3, *preprocessing.image_size)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
            partial = Path(folder) / output.name
            example = Tensor(shape=shape, dtype=ms.float32) if batch_size is None else _zeros(shape)
            ms.export(net, example, file_name=str(partial), file_format=file_format.upper())
            if not partial.is_file():
                raise UserError(
                    f"{output}: larger than the 1 GiB that MindSpore writes into one file; "
                    "cvt_w24 can't be exported yet"
                )
            if file_format == "mindir":
                _check(net, partial, _images(config, preprocessing), batch_size)
            else:
                logger.info("an AIR file can't be loaded back by MindSpore, so it was not checked")
            make_readable(partial)
            describe(config, checkpoint, output, file_format, shape, preprocessing)
            os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from error
    logger.info("wrote %s and %s.json", output, output.name)


def _require_ascend(output: Path, device: str) -> None:
    if device != "Ascend":
        raise UserError(
            f"{output}: AIR is written by the Ascend backend only: run this command on a host with "
            "an Ascend card and CANN, or export --format mindir here"
        )


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


def describe(
    config: Config,
    checkpoint: Path,
    output: Path,
    file_format: str,
    shape: tuple[int | None, ...],
    preprocessing: Preprocessing,
) -> None:
    """Write beside an exported file what its user must know; null in a shape is any number."""
    description = {
        "model": config.model.name,
        "format": file_format,
        "input_shape": list(shape),
        "input_dtype": "float32",
        "preprocessing": preprocessing.to_dict(),
        "class_names": config.data.class_names,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_of(checkpoint),
        "mindspore": ms.__version__,
    }
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


def _check(net: nn.Cell, file: Path, images: np.ndarray, batch_size: int | None) -> None:
    """Compare the written file's logits with the checkpoint's.

    Raises:
        UserError: they differ by more than the tolerance.
    """
    exported = nn.GraphCell(ms.load(str(file)))
    size = batch_size or 3  # no divisor of 16: a dynamic batch is seen at two sizes
    expected, found = [], []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        missing = size - len(batch) if batch_size else 0
        padded = Tensor(np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0))))
        expected.append(net(padded).asnumpy()[: len(batch)])
        found.append(exported(padded).asnumpy()[: len(batch)])
    expected, found = np.concatenate(expected), np.concatenate(found)
    difference = float(np.abs(expected - found).max())
    agreement = 100 * float((expected.argmax(1) == found.argmax(1)).mean())
    logger.info(
        "checked on %d images: largest difference of the logits %.1e, top-1 agrees on %.1f %%",
        len(images), difference, agreement,
    )  # fmt: skip
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported logits differ by {difference:.1e} from the checkpoint's, "
            f"more than {TOLERANCE:.0e}: not kept; report this as a fault"
        )
