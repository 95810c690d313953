"""Registry of models by name; `src/models/__init__.py` imports the modules that register them."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore import nn

from src.errors import UserError, shorten

try:  # a context in which networks are created without drawing weights, which a file sets
    from mindspore.nn.utils import no_init_parameters as uninitialised
except ImportError:  # deprecated since 2.10; creation then takes longer
    uninitialised = contextlib.nullcontext

_MODELS: dict[str, Callable[..., nn.Cell]] = {}


def register_model(build: Callable[..., nn.Cell]) -> Callable[..., nn.Cell]:
    """Register a function that builds a network under the function's name.

    Its annotated return type is the network's class, whose constructor documents the arguments.
    """
    _MODELS[build.__name__] = build
    return build


def list_models() -> list[str]:
    """Return the names of all models, sorted."""
    return sorted(_MODELS)


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Cell:
    """Build a network with newly initialised weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; 0 for no head.
        kwargs: any argument of the network's class (`src.models.cvt.CvT`, `vit.VisionTransformer`,
            `resnet.ResNet`); they override the variant's own.

    Returns:
        A cell: float32 images [B, 3, H, W] -> logits [B, num_classes].

    Raises:
        UserError: the name is unknown, or an argument is unknown or invalid.
    """
    if not isinstance(name, str) or name not in _MODELS:
        near = difflib.get_close_matches(str(name), _MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"model {shorten(repr(name))} is unknown: {hint}choose from {', '.join(list_models())}"
        )
    known = _arguments(_MODELS[name])
    if "pretrained" in kwargs:
        raise UserError(
            "create_model: has no argument pretrained; use src.weights.create_pretrained"
        )
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise UserError(
            f"model {name} has no {', '.join(unknown)}: leave it out; it has {', '.join(known)}"
        )
    arguments = {"num_classes": num_classes, **kwargs}
    return _MODELS[name](**{key: _without_numpy(value) for key, value in arguments.items()})


def _without_numpy(value: Any) -> Any:
    """Return a number or a list of numbers in Python's own types, such as that of labels.max()."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [_without_numpy(each) for each in value] if isinstance(value, (list, tuple)) else value


def _arguments(build: Callable[..., nn.Cell]) -> list[str]:
    """Return the arguments of the constructor of a model's class."""
    network = typing.get_type_hints(build)["return"]
    return [name for name in inspect.signature(network.__init__).parameters if name != "self"]
