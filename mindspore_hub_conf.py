"""Entry point for MindSpore Hub."""

from __future__ import annotations

from mindspore import nn

from src.models import create_model
from src.weights import create_pretrained


def create_network(name: str, *args, pretrained: str | None = None, **kwargs) -> nn.Cell:
    """Build a network by name, as `src.models.create_model` does.

    Args:
        name: name of the network.
        args, kwargs: as for `create_model`.
        pretrained: data set of the pretrained weights, as for `src.weights.create_pretrained`; None
            initialises the weights randomly.

    Raises:
        UserError: unknown name or invalid arguments.
    """
    if pretrained:
        return create_pretrained(name, pretrained, *args, **kwargs)
    return create_model(name, *args, **kwargs)
