"""Classify images with an exported file or a checkpoint."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
from mindspore import nn
from PIL import Image

from src.config_io import find_checkpoint
from src.data.headers import SERVED_PIXELS, check_size
from src.data.images import to_rgb
from src.data.transforms import pad_batch
from src.deploy.engines import check_engine
from src.deploy.loaded_model import EXPORTED_SUFFIXES, open_exported, open_weights
from src.errors import UserError

MAX_THREADS = 1024
BYTES_PER_PIXEL = 16  # in a file; four values of 16 bits take 8
ImageLike = Union[str, os.PathLike, bytes, Image.Image, np.ndarray]


class Prediction(NamedTuple):
    """One candidate class of an image."""

    label: int
    name: str
    probability: float


class Predictor:
    """A classifier that may be called from any thread of its process.

        Predictor("model.mindir")(["a.jpg", "b.png"])

    An image is a path, the content of a file as `bytes`, a PIL image, or uint8 [H, W, 3] in RGB.
    The network is compiled in graph mode without changing the process's mode.

    Args:
        path: a .mindir or .onnx with its .json beside it, weights (a .ckpt with its run's
            config.yaml), or a run's folder, whose checkpoints/best.ckpt is used.
        config: a recipe, for weights without a config.yaml beside them.
        batch_size: images per batch, unless the file has a fixed batch size.
        engine: "openvino" or "onnxruntime" for an .onnx, "mindspore" for other files; "auto"
            prefers OpenVINO for an .onnx if it is installed.
        threads: computing threads; None uses all cores of the process. MindSpore and the compiled
            operators have one setting per process, so the last one applies.
        max_pixels: larger images are refused by their header, before they take memory. Training and
            evaluation accept up to 89,478,485 pixels.
        runtime: keys of the recipe's group `runtime` to change, for weights only: mode, precision,
            flash_attention, compiled_ops, depthwise. On a CPU the default precision is float32.

    Raises:
        UserError: the file is missing, damaged or of another kind, the engine is missing, or
            MindSpore ran in the process that this one was forked from.
    """

    def __init__(
        self,
        path: str | Path,
        config: str | Path | None = None,
        batch_size: int = 16,
        *,
        engine: str = "auto",
        threads: int | None = None,
        max_pixels: int = SERVED_PIXELS,
        runtime: Mapping[str, Any] | None = None,
    ):
        if not str(path):
            raise UserError("the model's path is empty; give a .mindir, an .onnx or weights")
        path = find_checkpoint(Path(os.path.expanduser(path)))
        config = config and os.path.expanduser(config)
        batch_size = _whole("batch_size", batch_size)
        max_pixels = _whole("max_pixels", max_pixels)
        threads = None if threads is None else _whole("threads", threads, MAX_THREADS)
        if not path.exists():
            raise UserError(f"{path}: no such file; give a .mindir, an .onnx or weights")
        check_engine(path, engine)
        if path.suffix in EXPORTED_SUFFIXES:
            model = open_exported(path, config, engine, threads, runtime)
        else:
            model = open_weights(path, config, threads, runtime or {})
        self._model = model
        self.preprocessing, self.class_names = model.preprocessing, model.class_names
        self.batch_size = model.batch_size or batch_size
        self.max_pixels = max_pixels
        self._compiled_sizes: set[int] = set()  # batch sizes that the network was compiled for
        self._path = path

    @property
    def engine(self) -> str:
        """The engine that runs the model: "openvino", "onnxruntime" or "mindspore"."""
        return self._model.session.engine

    @property
    def network(self) -> nn.Cell:
        """The network of a weight file; on a CPU, `copy.deepcopy` can't copy its operators.

        Raises:
            UserError: the model is an exported file.
        """
        if self._model.network is None:
            raise UserError(
                f"{self._path}: the layers of an exported file are not accessible; give the "
                "weights, as a .ckpt"
            )
        return self._model.network

    def prepare(self, image: ImageLike) -> np.ndarray:
        """Preprocess an image as in evaluation, to the network's input float32 [3, H, W].

        Raises:
            UserError: the image can't be read.
        """
        if isinstance(image, str) and not image:
            raise UserError("an image's path is empty (an unset variable?); give a file")
        name = f"{image}: " if isinstance(image, (str, os.PathLike)) else ""
        try:
            if isinstance(image, Image.Image):
                check_size(*image.size, self.max_pixels)
                image = to_rgb(image)
            elif name:
                image = _read(Path(image), self.max_pixels)
            elif not isinstance(image, (bytes, np.ndarray)):
                kind = type(image).__name__
                raise ValueError(f"an image must be a path, bytes, PIL image or array, not {kind}")
            elif isinstance(image, np.ndarray) and not image.size:
                raise ValueError(f"an image of shape {image.shape} has no pixels")
            return self.preprocessing(image, self.max_pixels)
        except OSError as error:
            reason = error.strerror or "not a readable image"
            raise UserError(f"{name}{reason}; give an image file") from None
        except ValueError as error:
            raise UserError(f"{name}{error}") from None

    def __call__(self, images: Sequence[ImageLike], top_k: int = 5) -> list[list[Prediction]]:
        """Return the `top_k` best classes of each image, best first.

        Raises:
            UserError: an image can't be read, `images` is a single image, or `top_k` is invalid.
        """
        results = list(self.stream(images, top_k))
        for result in results:
            if isinstance(result, UserError):
                raise result
        return results

    def stream(
        self, images: Iterable[ImageLike], top_k: int = 5
    ) -> Iterator[list[Prediction] | UserError]:
        """Yield each image's best classes as calling returns them, for any number of images.

        For an image that can't be read, the result is its UserError.

        Raises:
            UserError: `images` is a single image, or `top_k` is invalid.
        """
        if isinstance(images, (str, os.PathLike, bytes, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        ):
            raise UserError("a Predictor takes several images: give a list, even for one image")
        remaining, largest = iter(images), 0
        while True:
            batch = [self._try_prepare(image) for image in islice(remaining, self.batch_size)]
            if not batch:
                return
            readable = [each for each in batch if isinstance(each, np.ndarray)]
            logits = self.logits(np.stack(readable), largest) if readable else ()
            largest = max(largest, len(readable))
            predictions = iter(self._rank(logits, top_k))
            for each in batch:
                yield next(predictions) if isinstance(each, np.ndarray) else each

    def _try_prepare(self, image: ImageLike) -> np.ndarray | UserError:
        try:
            return self.prepare(image)
        except UserError as error:
            return error

    def classify(self, inputs: np.ndarray, top_k: int = 5) -> list[list[Prediction]]:
        """Return the best classes of prepared images, float32 [N, 3, H, W], N <= `batch_size`."""
        return self._rank(self.logits(inputs), top_k)

    def _rank(self, logits: Sequence[np.ndarray], top_k: int) -> list[list[Prediction]]:
        top_k = _whole("top_k", top_k)
        if not len(logits):
            return []
        logits = np.asarray(logits, np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [Prediction(int(k), self._name(int(k)), float(row[k])) for k in ranked]
            for row, ranked in zip(probabilities, best)
        ]

    def logits(self, inputs: np.ndarray, max_padded: int = 0) -> np.ndarray:
        """Return the logits of prepared images.

        Args:
            inputs: floating-point [N, 3, H, W], N <= `batch_size`; computed in float32.
            max_padded: pad to a compiled batch size up to this, however few the images are; set it
                for the last batch of a stream.

        Returns:
            float32 [N, num_classes].

        Raises:
            UserError: the inputs have another type or shape than prepared images, the logits are
                not finite, or N exceeds the file's batch size.
        """
        inputs = self._check_inputs(inputs)
        count = len(inputs)
        if not count:  # kernels divide by the batch size
            return self.logits(np.zeros((1, *inputs.shape[1:]), np.float32))[:0]
        size = self._padded_size(count, max_padded)
        if size < count:
            raise UserError(f"{self._path}: takes {size} images at once, not {count}")
        logits = self._model.session(pad_batch(inputs, size))[:count]
        if not np.isfinite(logits).all():
            if not np.isfinite(inputs).all():
                raise UserError(
                    f"{self._path}: the prepared images have values that are not finite"
                )
            raise UserError(f"{self._path}: its output is not finite: the weights are damaged")
        if self.class_names and logits.shape[1:] != (len(self.class_names),):
            raise UserError(
                f"{self._path}: has {logits.shape[1:]} outputs and {len(self.class_names)} class "
                "names: its .json or config.yaml belongs to another model"
            )
        return logits

    def _check_inputs(self, inputs: np.ndarray) -> np.ndarray:
        """Return prepared images as float32; a network itself takes other sizes, a file does not.

        Raises:
            UserError: another type or shape.
        """
        inputs = np.asarray(inputs)
        height, width = self.preprocessing.image_size
        if inputs.dtype.kind != "f":
            raise UserError(
                f"{self._path}: takes prepared images in floating point, not {inputs.dtype}; "
                "`prepare` converts an image, and calling the Predictor takes images as they are"
            )
        is_file = self._model.network is None
        if inputs.shape[1:] != (3, height, width) and (
            is_file or inputs.ndim != 4 or inputs.shape[1] != 3
        ):
            size = f"{height}, {width}" if is_file else "H, W"
            raise UserError(
                f"{self._path}: takes prepared images [N, 3, {size}], not {list(inputs.shape)}"
            )
        return np.ascontiguousarray(inputs, np.float32)

    def _padded_size(self, count: int, max_padded: int) -> int:
        """Return the batch size to pad to: a compiled one if that avoids a compilation.

        At most doubles the batch, or enlarges it to `max_padded`.
        """
        if self._model.batch_size or self._model.network is None:
            return self._model.batch_size or count
        limit = max(2 * count, max_padded)
        sizes = tuple(self._compiled_sizes)  # other threads may add to it
        size = min((s for s in sizes if count <= s <= limit), default=count)
        self._compiled_sizes.add(size)
        return size

    def _name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else str(label)


def _whole(name: str, number: Any, most: int = sys.maxsize) -> int:
    """Return a whole number of any type, such as NumPy's, from 1 to `most`.

    Raises:
        UserError: it is none.
    """
    if not isinstance(number, Integral) or isinstance(number, bool) or not 1 <= number <= most:
        raise UserError(f"{name} {number!r}: must be a whole number from 1 to {most}")
    return int(number)


def _read(path: Path, max_pixels: int) -> bytes:
    """Read an image file.

    Raises:
        OSError: it can't be read.
        ValueError: it is a pipe or device, or larger than any image that is accepted.
    """
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise ValueError("not a regular file; give an image file")
    if status.st_size > BYTES_PER_PIXEL * max_pixels:
        raise ValueError(
            f"{status.st_size >> 20} MiB, too much for an image of at most {max_pixels:,} pixels"
        )
    return path.read_bytes()
