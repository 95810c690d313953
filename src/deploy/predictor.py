"""Classes of images from an exported file or a checkpoint, in five lines of a user's code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
from mindspore import nn
from PIL import Image

from src.build import (
    accelerate,
    build_model,
    build_preprocessing,
    without_flash_attention,
)
from src.config_io import find_checkpoint, load_config, run_config_of
from src.data import Preprocessing
from src.data.headers import SERVED_PIXELS, check_size
from src.data.images import to_pixels
from src.deploy.description import read_description
from src.deploy.engines import (
    Session,
    check_engine,
    claim_mindspore,
    mindspore_session,
    open_model,
)
from src.device import current_device, require_precision
from src.errors import UserError
from src.weights import load_weights, weight_files

EXPORTED_SUFFIXES = (".mindir", ".onnx")
RUNTIME_OF_WEIGHTS = ("mode", "precision", "flash_attention", "compiled_ops")
ImageLike = Union[str, os.PathLike, bytes, Image.Image, np.ndarray]


class Prediction(NamedTuple):
    """One candidate class of an image."""

    label: int
    name: str
    probability: float


class Predictor:
    """A classifier ready to use, from any thread of its process.

        Predictor("model.mindir")(["a.jpg", "b.png"])

    An image is a file's path, a file's content as `bytes`, a PIL image, or uint8 [H, W, 3] in RGB.
    The network is compiled in graph mode whatever the process's mode is, and that stays as it is.

    Args:
        path: a .mindir or .onnx with its .json beside it, weights (a .ckpt with its run's
            config.yaml), or a run's folder, whose checkpoints/best.ckpt is taken.
        config: a recipe for weights that have no config.yaml beside them.
        batch_size: images at once, where the file leaves it open.
        engine: "openvino" or "onnxruntime" for an .onnx, "mindspore" for the others; "auto" takes
            OpenVINO where it is installed.
        threads: that compute; None takes all cores that the process may use. MindSpore and the
            compiled operators have one number for the whole process, the last one that was given.
        max_pixels: larger images are refused by their header, before they take memory. Training and
            evaluation take up to 89,478,485.
        runtime: keys of the recipe's group `runtime` to change, for weights: any of
            `RUNTIME_OF_WEIGHTS`.

    Raises:
        UserError: a file that is missing, damaged or of another kind, an engine that is missing,
            or a process that was forked from one in which MindSpore had run.
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
        path = find_checkpoint(Path(path).expanduser())
        for name, number in (
            ("batch_size", batch_size),
            ("threads", threads),
            ("max_pixels", max_pixels),
        ):
            if number is not None and number < 1:
                raise UserError(f"{name} {number}: must be 1 or more")
        if not path.exists():
            raise UserError(f"{path}: no such file; give a .mindir, an .onnx or weights")
        check_engine(path, engine)
        if path.suffix in EXPORTED_SUFFIXES:
            opened = _open_exported(path, config, engine, threads, runtime)
        else:
            opened = _open_weights(path, config, threads, runtime or {})
        self._run, self._network, self.preprocessing, self.class_names, self._fixed = opened
        self.batch_size = self._fixed or batch_size
        self.max_pixels = max_pixels
        self._sizes: set[int] = set()  # batches that the network was compiled for
        self._path = path

    @property
    def engine(self) -> str:
        """The engine that runs the model: "openvino", "onnxruntime" or "mindspore"."""
        return self._run.engine

    @property
    def network(self) -> nn.Cell:
        """The network of a weight file.

        Raises:
            UserError: the model is an exported file, which can only be run as a whole.
        """
        if self._network is None:
            raise UserError(
                f"{self._path}: an exported file can't be looked into; give the weights, as a .ckpt"
            )
        return self._network

    def prepare(self, image: ImageLike) -> np.ndarray:
        """An image -> the network's input float32 [3, H, W], as evaluation makes it.

        Raises:
            UserError: no image that can be read.
        """
        name = f"{image}: " if isinstance(image, (str, os.PathLike)) else ""
        try:
            if isinstance(image, Image.Image):
                check_size(*image.size, self.max_pixels)
                image = to_pixels(image)
            elif name:
                image = Path(image).read_bytes()
            elif not isinstance(image, (bytes, np.ndarray)):
                raise ValueError(f"an image is a path, bytes, PIL image or array, not {image!r}")
            return self.preprocessing(image, self.max_pixels)
        except OSError as error:
            reason = error.strerror or "not a readable image"
            raise UserError(f"{name}{reason}; give an image file") from None
        except ValueError as error:
            raise UserError(f"{name}{error}") from None

    def __call__(self, images: Sequence[ImageLike], top_k: int = 5) -> list[list[Prediction]]:
        """The `top_k` best classes of each image, best first, in the order of the images.

        Raises:
            UserError: an image that can't be read, or one image instead of several.
        """
        results = list(self.stream(images, top_k))
        for result in results:
            if isinstance(result, UserError):
                raise result
        return results

    def stream(
        self, images: Iterable[ImageLike], top_k: int = 5
    ) -> Iterator[list[Prediction] | UserError]:
        """As calling, a result at a time, so that any number of images fits into memory.

        An image that can't be read has its UserError among the results, beside the good ones.

        Raises:
            UserError: one image instead of several.
        """
        if isinstance(images, (str, os.PathLike, bytes, Image.Image)) or (
            isinstance(images, np.ndarray) and images.ndim < 4
        ):
            raise UserError("a Predictor takes several images: give a list, if need be of one")
        remaining, largest = iter(images), 0
        while True:
            batch = [self._try(image) for image in islice(remaining, self.batch_size)]
            if not batch:
                return
            readable = [each for each in batch if isinstance(each, np.ndarray)]
            logits = self._logits(np.stack(readable), largest) if readable else ()
            largest = max(largest, len(readable))
            predictions = iter(self._rank(logits, top_k))
            for each in batch:
                yield next(predictions) if isinstance(each, np.ndarray) else each

    def _try(self, image: ImageLike) -> np.ndarray | UserError:
        try:
            return self.prepare(image)
        except UserError as error:
            return error

    def classify(self, inputs: np.ndarray, top_k: int = 5) -> list[list[Prediction]]:
        """As calling, for prepared inputs float32 [N, 3, H, W], N at most `batch_size`."""
        return self._rank(self.logits(inputs), top_k)

    def _rank(self, logits: Sequence[np.ndarray], top_k: int) -> list[list[Prediction]]:
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

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """Prepared inputs float32 [N, 3, H, W], N at most `batch_size` -> float32 [N, classes].

        Raises:
            UserError: they are not finite, or N is larger than the file's batch.
        """
        return self._logits(inputs)

    def _logits(self, inputs: np.ndarray, at_hand: int = 0) -> np.ndarray:
        count = len(inputs)
        size = self._batch_for(count, at_hand)
        if size < count:
            raise UserError(f"{self._path}: takes {size} images at once, not {count}")
        if size > count:
            inputs = np.pad(inputs, ((0, size - count), (0, 0), (0, 0), (0, 0)))
        logits = self._run(inputs)[:count]
        if not np.isfinite(logits).all():
            raise UserError(f"{self._path}: its output is not finite: the weights are damaged")
        if self.class_names and logits.shape[1:] != (len(self.class_names),):
            raise UserError(
                f"{self._path}: has {logits.shape[1:]} outputs and {len(self.class_names)} class "
                "names: its .json or config.yaml is another model's"
            )
        return logits

    def _batch_for(self, count: int, at_hand: int) -> int:
        """The batch to fill up to: a compiled one where that saves a compilation.

        Args:
            count: of images.
            at_hand: a batch of the same stream, whose last one may be smaller.
        """
        if self._fixed or self._network is None:
            return self._fixed or count
        fitting = [size for size in self._sizes if count <= size <= max(2 * count, at_hand)]
        size = min(fitting, default=count)
        self._sizes.add(size)
        return size

    def _name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else str(label)


_Opened = tuple[Session, Union[nn.Cell, None], Preprocessing, list[str], Union[int, None]]


def _open_exported(
    path: Path,
    config: str | Path | None,
    engine: str,
    threads: int | None,
    runtime: Mapping[str, Any] | None,
) -> _Opened:
    if config is not None:
        raise UserError(f"--config {config}: is for weights only; {path}.json has all that counts")
    for key in runtime or ():
        raise UserError(f"runtime.{key}: is for weights only; export.py settled it for {path}")
    description = read_description(path)
    session = open_model(path, engine, threads)
    names, fixed = description["class_names"], description["input_shape"][0]
    return session, None, description["preprocessing"], names, fixed


def _open_weights(
    path: Path, config: str | Path | None, threads: int | None, runtime: Mapping[str, Any]
) -> _Opened:
    weight_files(path)  # says what any other file is
    config = config or run_config_of(path)
    if config is None:
        raise UserError(f"{path}: no config.yaml of a run beside it; give --config")
    settings = load_config(Path(config))
    if settings.model.num_classes is None:
        raise UserError(f"{config}: model.num_classes is not set; give the run's config.yaml")
    for key in set(runtime) - set(RUNTIME_OF_WEIGHTS):
        raise UserError(f"runtime.{key}: choose from {', '.join(RUNTIME_OF_WEIGHTS)}")
    if not runtime.get("flash_attention"):
        settings = without_flash_attention(settings)
    settings.runtime = dataclasses.replace(settings.runtime, **runtime)
    claim_mindspore()
    require_precision(settings.runtime.precision, current_device())
    net = build_model(settings)
    load_weights(net, path)
    accelerate(net, settings.runtime).set_train(False)
    compiled = runtime.get("mode") != "pynative"
    session = mindspore_session(net, threads, compiled=compiled)
    return session, net, build_preprocessing(settings), settings.data.class_names or [], None
