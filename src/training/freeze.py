"""Freezes parts of a network."""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import nn

from src.errors import UserError, join_names

HEAD = "head"


def freeze(net: nn.Cell, parts: Sequence[str]) -> list[nn.Cell]:
    """Exclude parts of a network from the gradient.

    Args:
        net: the network; its `requires_grad` flags are changed.
        parts: parameter names or their leading components ("stage0", "stage1.blocks.0"), or
            "backbone" for everything except the head.

    Returns:
        The cells that are frozen entirely. Keep them in evaluation mode, so that their BatchNorms
        use the running statistics and do not update them.

    Raises:
        UserError: the network has no such part, or nothing is left to train.
    """
    names = [parameter.name for parameter in net.get_parameters()]
    for part in parts:
        if part != "backbone" and not any(_is_in(name, part) for name in names):
            parts_of_net = dict.fromkeys(name.split(".")[0] for name in names)
            raise UserError(
                f"training.freeze: the network has no part {part!r}; it has backbone, "
                f"{join_names(list(parts_of_net))}, and their parts"
            )
    for parameter in net.get_parameters():
        if any(_is_in(parameter.name, part) for part in parts):
            parameter.requires_grad = False
    if not net.trainable_params():
        raise UserError(f"training.freeze {list(parts)}: nothing is left to train")
    return [cell for name, cell in net.cells_and_names() if any(_is_in(name, p) for p in parts)]


def _is_in(name: str, part: str) -> bool:
    if part == "backbone":
        return name != "" and not _is_in(name, HEAD)
    return name == part or name.startswith(f"{part}.")
