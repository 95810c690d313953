"""Pretrained networks that come with the repository, by name."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mindspore import nn

from src.errors import UserError
from src.files import sha256_of
from src.models import create_model
from src.weights.load import load_weights

logger = logging.getLogger("cvt")
SHAPELESS = ("kv_stride", "num_heads", "qkv_projection")  # the tensors are the same for several
FOLDER = Path(__file__).resolve().parents[2] / "pretrained"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Pretrained:
    """A network's weights.

    Args:
        model: one of `src.models.list_models()`, with the variant's own sizes.
        data: what it was trained on.
        num_classes: outputs of its head.
        sha256: of the file of weights.
    """

    model: str
    data: str
    num_classes: int
    sha256: str

    @property
    def folder(self) -> Path:
        """Holds the weights and config.yaml, as a run's folder does."""
        return FOLDER / f"{self.model}_{self.data}"


_PRETRAINED = (
    Pretrained(
        "cvt_nano",
        "cifar10",
        10,
        "9227046083bd210b84e0adac2a4f5757a40e836745be94c4ba34a9cbd2675f57",
    ),
)


def list_pretrained() -> list[tuple[str, str]]:
    """Return the (model, data) pairs that `create_pretrained` knows."""
    return [(entry.model, entry.data) for entry in _PRETRAINED]


def pretrained_folder(model: str, data: str) -> Path:
    """Return the folder of a pretrained network, for `Predictor`, infer.py and train.py --finetune.

    Raises:
        UserError: no such network comes with the repository, or its file is missing or altered.
    """
    return _find(model, data).folder


def create_pretrained(
    model: str, data: str = "cifar10", num_classes: int | None = None, **kwargs
) -> nn.Cell:
    """Create a network with pretrained weights.

    Args:
        model: its name, as for `create_model`.
        data: what it was trained on.
        num_classes: outputs of the head; a number other than the weights' own starts a new head.
        kwargs: as for `create_model`; those that change a weight's shape do not fit, and a warning
            names those that fit but may change what the weights compute.

    Returns:
        A cell: float32 images [B, 3, H, W] -> logits [B, num_classes].

    Raises:
        UserError: no such network comes with the repository, its file is missing or altered, or it
            does not fit.
    """
    entry = _find(model, data)
    classes = entry.num_classes if num_classes is None else num_classes
    net = create_model(model, classes, **kwargs)
    given = ", ".join(key for key in SHAPELESS if key in kwargs)
    if given:
        logger.warning(
            "%s: trained with the variant's own %s; with another value, the weights compute "
            "something else", entry.folder, given,
        )  # fmt: skip
    load_weights(net, entry.folder / WEIGHTS, new_head=classes != entry.num_classes)
    return net


def _find(model: str, data: str) -> Pretrained:
    entry = next((e for e in _PRETRAINED if (e.model, e.data) == (model, data)), None)
    if entry is None:
        known = ", ".join(" on ".join(pair) for pair in list_pretrained())
        raise UserError(
            f"no pretrained {model} on {data} comes with this repository; choose from: {known}"
        )
    file = entry.folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: pretrained weights are missing; restore it with git checkout")
    if sha256_of(file) != entry.sha256:
        raise UserError(
            f"{file}: is not the file that comes with this repository (its SHA-256 differs); "
            "restore it with git checkout"
        )
    return entry
