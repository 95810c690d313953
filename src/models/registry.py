"""Models by name: the one way to create any of them."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable

from mindspore import nn

from src.errors import UserError, shown

_MODELS: dict[str, Callable[..., nn.Cell]] = {}


def register_model(build: Callable[..., nn.Cell]) -> Callable[..., nn.Cell]:
    """Enter a function that builds a network under its own name.

    Its annotated return type is the network's class, whose constructor takes its arguments.
    """
    _MODELS[build.__name__] = build
    return build


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(_MODELS)


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Cell:
    """Build a network with freshly initialised weights.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; 0 leaves the head out.
        kwargs: any argument of the network's class (`src.models.cvt.CvT`, `vit.VisionTransformer`,
            `resnet.ResNet`); they override the variant's own.

    Returns:
        A cell: float32 images [B, 3, H, W] -> logits [B, num_classes].

    Raises:
        UserError: an unknown name, or arguments that make no network.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"model {shown(repr(name))} is unknown: {hint}choose from {', '.join(list_models())}"
        )
    known = _arguments(_MODELS[name])
    if "pretrained" in kwargs:
        raise UserError(
            "create_model: pretrained is no argument, as models/ reads no files; "
            "use src.weights.create_pretrained"
        )
    strange = [key for key in kwargs if key not in known]
    if strange:
        raise UserError(
            f"model {name} has no {', '.join(strange)}: leave it out; it takes {', '.join(known)}"
        )
    return _MODELS[name](num_classes=num_classes, **kwargs)


def _arguments(build: Callable[..., nn.Cell]) -> list[str]:
    """What the constructor of a model's class takes."""
    network = typing.get_type_hints(build)["return"]
    return [name for name in inspect.signature(network.__init__).parameters if name != "self"]
