"""The door through which MindSpore Hub creates a network of this repository."""

from __future__ import annotations

from mindspore import nn

from src.models import create_model
from src.weights import create_pretrained


def create_network(name: str, *args, pretrained: str | None = None, **kwargs) -> nn.Cell:
    """Build a network by name, as `src.models.create_model` does.

    Args:
        name: of the network.
        args, kwargs: as for `create_model`.
        pretrained: data whose weights to load, as for `src.weights.create_pretrained`; None
            initialises them.

    Raises:
        UserError: an unknown name, or arguments that make no network.
    """
    if pretrained:
        return create_pretrained(name, pretrained, *args, **kwargs)
    return create_model(name, *args, **kwargs)
