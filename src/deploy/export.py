"""Export a checkpoint for deployment and compare the file's logits with the checkpoint's."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from src.build import build_for_weights, build_preprocessing
from src.config import Config
from src.config_io import load_config, run_config_of
from src.data import Preprocessing, create_eval_loader
from src.data.transforms import pad_batch
from src.deploy.class_names import known_class_names
from src.deploy.description import check_readable
from src.deploy.engines import Run, open_model
from src.deploy.quantize import check_quantizer, quantize
from src.deploy.writers import check_format, installed_engines, write_model
from src.errors import UserError
from src.evaluation.labels import compare_with_run, with_class_names
from src.files import as_json, as_utf8, is_utf8, replacing_together, sha256_of
from src.splits import open_split, resolve_classes
from src.weights import load_weights, unchanged

logger = logging.getLogger("cvt")
CHECKED_IMAGES = 16
CHECKED_BATCHES = (1, 3, 12)  # batch sizes for a file that takes any


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Args:
        file_format: "mindir", "onnx" or "air".
        batch_size: images per batch; None lets the file take any number.
        weight_dtype, precision: as in `writers.write_model`; the run's own do not matter.
        tolerance: allowed difference from the checkpoint's logits, relative to the largest of them
            if that exceeds 1; None for the default.
        quantize: quantize Linears and convolutions to int8 after the comparison (onnx, float32).
    """

    file_format: str = "mindir"
    batch_size: int | None = 1
    weight_dtype: str = "float32"
    precision: str = "float32"
    tolerance: float | None = None
    quantize: bool = False

    def get_tolerance(self) -> float:
        """Return the tolerance or its default; measured differences: 4e-6, with float16 3e-3."""
        if self.tolerance is not None:
            return self.tolerance
        if "float16" in (self.weight_dtype, self.precision):
            return 2e-2
        return 1e-5 if self.file_format == "mindir" else 1e-4


def export(
    config: Config, checkpoint: Path, output: Path, options: ExportOptions, device: str
) -> None:
    """Write `output` and `output`.json, or nothing if an error occurs.

    Args:
        config: the configuration of the checkpoint's run.
        checkpoint: the weights.
        output: the file to write.
        options: of the export.
        device: the device's kind, from `src.device.setup`.

    Raises:
        UserError: the checkpoint does not fit, the format can't be written here, or the logits
            differ from the checkpoint's.
    """
    check_format(options.file_format, options.batch_size, device)
    if not is_utf8(output.resolve()):
        raise UserError(f"--output {output}: engines open only names in UTF-8; give another")
    if options.quantize:
        check_quantizer()
    run = run_config_of(checkpoint)
    config = _with_num_classes(config, checkpoint, run)
    preprocessing = build_preprocessing(config)
    compare_with_run(checkpoint, config)
    shape = (options.batch_size, 3, *preprocessing.image_size)
    names = config.data.class_names or known_class_names(checkpoint, config.model.num_classes)
    check_readable(list(shape), preprocessing, names)
    # The run's precision does not matter for the file.
    runtime = dataclasses.replace(config.runtime, precision="float32", flash_attention=False)
    net = build_for_weights(dataclasses.replace(config, runtime=runtime))
    with unchanged(checkpoint) as files:  # a run may replace its best.ckpt
        checksum = sha256_of(*files)
        logger.info("%s", load_weights(net, checkpoint))
    net.set_train(False)
    images = _load_images(config, preprocessing)
    try:
        with replacing_together(f"{output}.json", output) as (described, partial):
            write_model(
                net, shape, partial, options.file_format, options.weight_dtype, options.precision
            )
            _check_file(net, partial, images, options)
            quantization = None
            if options.quantize:
                floating = partial.rename(partial.with_name(f"float32-{partial.name}"))
                size = options.batch_size or CHECKED_IMAGES
                quantization = quantize(
                    floating,
                    partial,
                    with_class_names(config, checkpoint),
                    preprocessing,
                    size,
                    run and run.parent,
                )
            description = _describe(config, partial, options, preprocessing, names, quantization)
            description["checkpoint"] = checkpoint.name
            description["checkpoint_sha256"] = checksum
            described.write_bytes(as_utf8(as_json(description)))
    except OSError as error:
        files = {Path(name) for name in (error.filename, error.filename2) if name}
        if files and not files & {Path(f"{output}.json"), output, *output.parents}:
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise UserError(f"{output}: {error.strerror}; give another --output") from error
    size = output.stat().st_size / 2**20
    logger.info("wrote %s (%.1f MiB) and %s.json", output, size, output.name)


def _with_num_classes(config: Config, checkpoint: Path, run: Path | None) -> Config:
    """Return a recipe with the number of classes: its own, the run's, or that of its images.

    Raises:
        UserError: it is unknown, or not the number of class names.
    """
    if config.model.num_classes is None and run is not None:
        with contextlib.suppress(UserError):  # another program's config.yaml
            config = _with_classes_of(config, load_config(run))
    if config.model.num_classes is None:
        config = with_class_names(config, checkpoint)
        config = resolve_classes(config, open_split(config, "val"))
    given = config.data.class_names
    if given and len(given) != config.model.num_classes:
        raise UserError(
            f"data.class_names has {len(given)} names, but the network {config.model.num_classes} "
            "outputs; name every class"
        )
    return config


def _with_classes_of(config: Config, run: Config) -> Config:
    """Return a recipe with the number and names of the classes that a run was trained for.

    Raises:
        UserError: the recipe names another number of classes.
    """
    given = config.data.class_names
    if given and len(given) != run.model.num_classes:
        raise UserError(f"data.class_names has {len(given)} names, not {run.model.num_classes}")
    model = dataclasses.replace(config.model, num_classes=run.model.num_classes)
    names = config.data.class_names or run.data.class_names
    data = dataclasses.replace(config.data, class_names=names)
    return dataclasses.replace(config, model=model, data=data)


def _describe(
    config: Config,
    file: Path,
    options: ExportOptions,
    preprocessing: Preprocessing,
    class_names: list[str] | None,
    quantization: dict | None,
) -> dict[str, Any]:
    """Return the description of an exported file; None in the input shape means any batch size."""
    description = {
        "model": config.model.name,
        "format": options.file_format,
        "input_shape": [options.batch_size, 3, *preprocessing.image_size],
        "input_dtype": "float32",
        "preprocessing": preprocessing.to_dict(),
        "class_names": class_names,
        "weight_dtype": options.weight_dtype,
        "precision": options.precision,
        "file_sha256": sha256_of(file),
        "mindspore": ms.__version__,
    }
    if quantization is not None:
        description["quantization"] = quantization
    if options.file_format == "onnx":
        from src.deploy.onnx_graph import OPSET  # needs onnx

        description["opset"] = OPSET
    return description


def _load_images(config: Config, preprocessing: Preprocessing) -> np.ndarray:
    """Load held-out images for the comparison; noise if the data is not available."""
    try:
        source = open_split(config, "val")
        if not len(source):
            raise UserError(f"{source.title}: no images")
        operations = preprocessing.operations(source.encoded)
        batches = create_eval_loader(source, operations, min(CHECKED_IMAGES, len(source)))
        images, _ = next(batches.iterate(output_numpy=True))
    except (UserError, OSError) as error:  # such as a folder of somebody else's
        logger.info("compared on noise, because the images are not available (%s)", error)
        shape = (CHECKED_IMAGES, 3, *preprocessing.image_size)
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return images


def _check_file(net: nn.Cell, path: Path, images: np.ndarray, options: ExportOptions) -> None:
    """Compare a written file's logits with the checkpoint's in each installed engine.

    Raises:
        UserError: an engine rejects the file, or the logits differ by more than the tolerance.
    """
    engines = installed_engines(options.file_format)
    if not engines:
        logger.info("MindSpore can't load an AIR file, so it was not checked")
        return
    expected = _run(lambda batch: net(Tensor(batch)).asnumpy(), images, [4] * -(-len(images) // 4))
    for engine in engines:
        run = open_model(path, engine)
        _compare(expected, run, images, options.batch_size, options.get_tolerance(), engine)


def _compare(
    expected: np.ndarray,
    run: Run,
    images: np.ndarray,
    batch_size: int | None,
    tolerance: float,
    engine: str,
) -> None:
    """Compare a file's logits with the expected ones; raises as `_check_file`."""
    count = len(images)
    sizes = CHECKED_BATCHES if batch_size is None else [batch_size] * -(-count // batch_size)
    found = _run(run, images, sizes)
    difference, largest = float(np.abs(expected - found).max()), float(np.abs(expected).max())
    agreement = 100 * float((expected.argmax(1) == found.argmax(1)).mean())
    logger.info(
        "checked in %s on %d images: largest difference of the logits %.1e (they reach %.1f), "
        "top-1 agrees on %.1f %%",
        engine, count, difference, largest, agreement,
    )  # fmt: skip
    allowed = tolerance * max(1.0, largest)
    if not difference <= allowed:
        raise UserError(
            f"the exported logits differ by {difference:.1e} from the checkpoint's in {engine}, "
            f"more than {allowed:.0e}: not kept; raise --tolerance, or report a bug"
        )


def _run(run: Run, images: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Run a model on images in batches of the given sizes, the last of them padded."""
    logits, start = [], 0
    for size in sizes:
        batch = images[start : start + size]
        start += size
        if len(batch):
            logits.append(run(pad_batch(batch, size))[: len(batch)])
    return np.concatenate(logits)
