"""Classes of images from an exported file or a checkpoint, in five lines of a user's code."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from PIL import Image

from src.command_line import load_config, run_config_of
from src.data import Preprocessing
from src.errors import UserError
from src.recipe import build_model, build_preprocessing, without_flash_attention
from src.weights import WEIGHT_SUFFIXES, load_weights


class Prediction(NamedTuple):
    """One candidate class of an image."""

    label: int
    name: str
    probability: float


class Predictor:
    """A classifier ready to use.

        Predictor("model.mindir")(["a.jpg", "b.png"])

    Args:
        path: a .mindir with its .json beside it, or weights (a .ckpt with its run's config.yaml).
        config: a recipe for weights that have no config.yaml beside them.
        batch_size: images at once, where the file leaves it open.

    Raises:
        UserError: a file that is missing, damaged or of another kind.
    """

    def __init__(self, path: str | Path, config: str | Path | None = None, batch_size: int = 16):
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a .mindir or weights")
        openers = {".mindir": _open_mindir, **dict.fromkeys(WEIGHT_SUFFIXES, _open_weights)}
        if path.suffix not in openers:
            raise UserError(f"{path}: must be one of {' '.join(openers)}")
        self._run, self.preprocessing, self.class_names, fixed = openers[path.suffix](path, config)
        self.batch_size = fixed or batch_size
        self._fixed = fixed is not None
        self._path = path

    @property
    def network(self) -> nn.Cell:
        """The network of a weight file.

        Raises:
            UserError: the model is an exported file, which can only be run as a whole.
        """
        if isinstance(self._run, nn.GraphCell):
            raise UserError(
                f"{self._path}: an exported file can't be looked into; give the weights, as a .ckpt"
            )
        return self._run

    def prepare(self, image: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """A file, a PIL image or uint8 [H, W, 3] in RGB -> the network's input float32 [3, H, W].

        Raises:
            UserError: a file that is no readable image.
        """
        if isinstance(image, Image.Image):
            return self.preprocessing(np.asarray(image.convert("RGB")))
        if isinstance(image, np.ndarray):
            return self.preprocessing(image)
        try:
            return self.preprocessing(Path(image).read_bytes())
        except OSError as error:
            raise UserError(f"{image}: {error.strerror}; give an image file") from None
        except UserError as error:
            raise UserError(f"{image}: {error}") from None

    def __call__(
        self, images: Sequence[str | Path | Image.Image | np.ndarray], top_k: int = 5
    ) -> list[list[Prediction]]:
        """The `top_k` best classes of each image, best first, in the order of the images.

        Raises:
            UserError: a file that is no readable image, or one image instead of several.
        """
        if isinstance(images, (str, Path, Image.Image)):
            raise UserError("a Predictor takes several images: give a list, if need be of one")
        results = []
        for start in range(0, len(images), self.batch_size):
            batch = [self.prepare(image) for image in images[start : start + self.batch_size]]
            results += self.classify(np.stack(batch), top_k)
        return results

    def classify(self, inputs: np.ndarray, top_k: int = 5) -> list[list[Prediction]]:
        """As calling, for prepared inputs float32 [N, 3, H, W], N at most `batch_size`."""
        missing = self.batch_size - len(inputs) if self._fixed else 0
        padded = np.pad(inputs, ((0, missing), (0, 0), (0, 0), (0, 0)))
        logits = self._run(Tensor(padded)).asnumpy()[: len(inputs)].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [Prediction(int(k), self._name(int(k)), float(row[k])) for k in ranked]
            for row, ranked in zip(probabilities, best)
        ]

    def _name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else str(label)


_Opened = tuple[Callable[[Tensor], Tensor], Preprocessing, list[str], "int | None"]


def _open_mindir(path: Path, config: str | Path | None) -> _Opened:
    beside = Path(f"{path}.json")
    if config is not None:
        raise UserError(f"--config {config}: is for weights only; {beside} has all that counts")
    try:
        description = json.loads(beside.read_text(encoding="utf-8"))
        preprocessing = Preprocessing.from_dict(description["preprocessing"])
        names, fixed = description["class_names"] or [], description["input_shape"][0]
    except OSError:
        raise UserError(
            f"{beside}: missing; keep it beside the model, export.py wrote it"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{beside}: not what export.py wrote ({error}); export again") from None
    try:
        graph = nn.GraphCell(ms.load(str(path)))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: damaged, or no MINDIR file; export again") from error
    return graph, preprocessing, names, fixed


def _open_weights(path: Path, config: str | Path | None) -> _Opened:
    config = config or run_config_of(path)
    if config is None:
        raise UserError(f"{path}: no config.yaml of a run beside it; give --config")
    settings = load_config(Path(config))
    if settings.model.num_classes is None:
        raise UserError(f"{config}: model.num_classes is not set; give the run's config.yaml")
    net = build_model(without_flash_attention(settings))
    load_weights(net, path)
    net.set_train(False)
    return net, build_preprocessing(settings), settings.data.class_names or [], None
