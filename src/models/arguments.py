"""Checks of the arguments that all networks share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from src.errors import UserError


def as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) in pixels from one number or two.

    Raises:
        UserError: the size is neither, or not positive.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not are_counts(size, 2):
        raise UserError(f"image_size {image_size!r}: must be a number of pixels or [height, width]")
    return tuple(size)


def are_counts(values: Sequence[int], number: int | None = None, lowest: int = 1) -> bool:
    """Return whether values are integers of `lowest` or more, as many as `number`."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == (number or max(len(values), 1))
        and all(isinstance(value, int) and value >= lowest for value in values)
    )


def check_number(name: str, value: float) -> None:
    """Check a number.

    Raises:
        UserError: it is none, or not finite.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name} {value!r}: must be a number")


def check_rate(name: str, rate: float) -> None:
    """Check a drop rate.

    Raises:
        UserError: it is not a number in [0, 1).
    """
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise UserError(f"{name} {rate}: must be a number in [0, 1)")


def check_flag(name: str, value: bool) -> None:
    """Check a switch.

    Raises:
        UserError: it is not True or False.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name} {value!r}: must be True or False")


def check_count(name: str, value: int) -> None:
    """Check a positive integer.

    Raises:
        UserError: it is not an integer of 1 or more.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} {value}: must be one integer, 1 or more")


def check_num_classes(num_classes: int) -> None:
    """Check the number of classes.

    Raises:
        UserError: it is not an integer, or negative.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
        raise UserError(f"num_classes {num_classes}: must be an integer, 0 (no head) or more")
