"""Checks of the arguments that all networks share."""

from __future__ import annotations

from collections.abc import Sequence

from src.errors import UserError


def as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) in pixels, of one number or two.

    Raises:
        UserError: neither.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"image_size {image_size}: must be a number of pixels, or (H, W)")
    return size


def check_rate(name: str, rate: float) -> None:
    """Refuse what is no probability of dropping.

    Raises:
        UserError: not one number in [0, 1).
    """
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise UserError(f"{name} {rate}: must be a number in [0, 1)")


def check_count(name: str, value: int) -> None:
    """Refuse what counts nothing.

    Raises:
        UserError: not one integer, 1 or more.
    """
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} {value}: must be one integer, 1 or more")


def check_num_classes(num_classes: int) -> None:
    """Refuse what is no size of a head.

    Raises:
        UserError: a negative number.
    """
    if num_classes < 0:
        raise UserError(f"num_classes {num_classes}: must be 0 (no head) or more")
