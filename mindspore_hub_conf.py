"""The door through which MindSpore Hub creates a network of this repository."""

from __future__ import annotations

from mindspore import nn

from src.models import create_model


def create_network(name: str, *args, **kwargs) -> nn.Cell:
    """Build a network by name, as `src.models.create_model` does.

    Raises:
        UserError: an unknown name, or arguments that make no network.
    """
    return create_model(name, *args, **kwargs)
