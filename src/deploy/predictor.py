"""Classes of images from an exported file or a checkpoint, in five lines of a user's code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
from mindspore import nn
from PIL import Image

from src.command_line import load_config, run_config_of
from src.data import Preprocessing
from src.data.images import to_pixels
from src.deploy.engines import Run, mindspore_session, open_model
from src.errors import UserError
from src.recipe import accelerate, build_model, build_preprocessing, without_flash_attention
from src.weights import WEIGHT_SUFFIXES, load_weights

EXPORTED_SUFFIXES = (".mindir", ".onnx")
ImageLike = Union[str, os.PathLike, bytes, Image.Image, np.ndarray]


class Prediction(NamedTuple):
    """One candidate class of an image."""

    label: int
    name: str
    probability: float


class Predictor:
    """A classifier ready to use.

        Predictor("model.mindir")(["a.jpg", "b.png"])

    An image is a file's path, a file's content as `bytes`, a PIL image, or uint8 [H, W, 3] in RGB.

    Args:
        path: a .mindir or .onnx with its .json beside it, or weights (a .ckpt with its run's
            config.yaml).
        config: a recipe for weights that have no config.yaml beside them.
        batch_size: images at once, where the file leaves it open.

    Raises:
        UserError: a file that is missing, damaged or of another kind.
    """

    def __init__(self, path: str | Path, config: str | Path | None = None, batch_size: int = 16):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a .mindir, an .onnx or weights")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be 1 or more")
        if path.suffix in EXPORTED_SUFFIXES:
            opened = _open_exported(path, config)
        elif path.suffix in WEIGHT_SUFFIXES:
            opened = _open_weights(path, config)
        else:
            known = " ".join((*EXPORTED_SUFFIXES, *WEIGHT_SUFFIXES))
            raise UserError(f"{path}: must be one of {known}")
        self._run, self._network, self.preprocessing, self.class_names, fixed = opened
        self.batch_size = fixed or batch_size
        self._filled_to = fixed or 0  # a compiled network takes the batch sizes that it has seen
        self._path = path

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
                image = to_pixels(image)
            elif name:
                image = Path(image).read_bytes()
            elif not isinstance(image, (bytes, np.ndarray)):
                raise ValueError(f"an image is a path, bytes, PIL image or array, not {image!r}")
            return self.preprocessing(image)
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
        remaining = iter(images)
        while True:
            batch = [self._try(image) for image in islice(remaining, self.batch_size)]
            if not batch:
                return
            readable = [each for each in batch if isinstance(each, np.ndarray)]
            predictions = iter(self.classify(np.stack(readable), top_k) if readable else ())
            for each in batch:
                yield next(predictions) if isinstance(each, np.ndarray) else each

    def _try(self, image: ImageLike) -> np.ndarray | UserError:
        try:
            return self.prepare(image)
        except UserError as error:
            return error

    def classify(self, inputs: np.ndarray, top_k: int = 5) -> list[list[Prediction]]:
        """As calling, for prepared inputs float32 [N, 3, H, W], N at most `batch_size`."""
        logits = self.logits(inputs).astype(np.float64)
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
            UserError: they are not finite.
        """
        if self._network is not None:
            self._filled_to = max(self._filled_to, len(inputs))
        missing = max(self._filled_to - len(inputs), 0)
        logits = self._run(np.pad(inputs, ((0, missing), (0, 0), (0, 0), (0, 0))))[: len(inputs)]
        if not np.isfinite(logits).all():
            raise UserError(f"{self._path}: its output is not finite: the weights are damaged")
        return logits

    def _name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else str(label)


_Opened = tuple[Run, Union[nn.Cell, None], Preprocessing, list[str], Union[int, None]]


def read_description(path: str | Path) -> dict:
    """What export.py wrote beside an exported file, its preprocessing as `Preprocessing`.

    Args:
        path: of the model, not of the .json.

    Raises:
        UserError: it is missing or not what export.py wrote.
    """
    beside = Path(f"{path}.json")
    try:
        description = json.loads(beside.read_text(encoding="utf-8"))
        description["preprocessing"] = Preprocessing.from_dict(description["preprocessing"])
        description["class_names"] = list(description["class_names"] or [])
        description["input_shape"] = tuple(description["input_shape"])
    except OSError:
        raise UserError(
            f"{beside}: missing; keep it beside the model, export.py wrote it"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{beside}: not what export.py wrote ({error}); export again") from None
    return description


def _open_exported(path: Path, config: str | Path | None) -> _Opened:
    if config is not None:
        raise UserError(f"--config {config}: is for weights only; {path}.json has all that counts")
    description = read_description(path)
    fixed = description["input_shape"][0]
    return (
        open_model(path),
        None,
        description["preprocessing"],
        description["class_names"],
        fixed,
    )


def _open_weights(path: Path, config: str | Path | None) -> _Opened:
    config = config or run_config_of(path)
    if config is None:
        raise UserError(f"{path}: no config.yaml of a run beside it; give --config")
    settings = load_config(Path(config))
    if settings.model.num_classes is None:
        raise UserError(f"{config}: model.num_classes is not set; give the run's config.yaml")
    net = build_model(without_flash_attention(settings))
    load_weights(net, path)
    accelerate(net, settings.runtime).set_train(False)
    names = settings.data.class_names or []
    return (
        mindspore_session(net),
        net,
        build_preprocessing(settings),
        names,
        None,
    )
