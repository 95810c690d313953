"""The result type of all weight file readers, and their common helpers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from src.errors import join_names

AGAIN = "download or save it again"
RESAVE = "in PyTorch 1.6 or later: torch.save(torch.load(FILE, map_location='cpu'), FILE)"
WIDENED = "bfloat16 widened to float32"

# The dict keys from the top level of a file down to a tensor; a single key in a flat file.
KeyPath = tuple[str, ...]


class Content(NamedTuple):
    """The tensors of a weight file.

    Args:
        tensors: by the file's names, in the file's order.
        notes: short phrases on skipped entries and conversions.
    """

    tensors: dict[str, np.ndarray]
    notes: list[str]


def widen(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16, given as its bits in uint16, to float32 of the same shape; exact."""
    wide = bits.astype(np.uint32, order="C")
    return np.left_shift(wide, np.uint32(16), out=wide).view(np.float32)


def short(text: object, limit: int = 80) -> str:
    """Return printable ASCII of at most `limit` characters, for a name from an untrusted file."""
    printable = ascii(str(text))[1:-1]
    return printable if len(printable) <= limit else f"{printable[: limit - 3]}..."


def short_names(names: Sequence[str], limit: int) -> str:
    """Join at most `limit` names from an untrusted file for a message."""
    return join_names([short(name) for name in names], limit)
