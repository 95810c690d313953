"""What every reader of weight files gives back, and what they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

AGAIN = "download or save it again"
WIDENED = "bfloat16 widened to float32"

# The keys of the dicts from the top level of a file down to a tensor; one key in a flat file.
Place = tuple[str, ...]


class Content(NamedTuple):
    """A file's tensors under the names they have there, in the file's order.

    `notes` says in short phrases what else was in the file, and what was done in reading it.
    """

    tensors: dict[str, np.ndarray]
    notes: list[str]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, which NumPy lacks, as its bits in uint16 -> float32 of the same shape, exact."""
    wide = bits.astype(np.uint32, order="C")
    return np.left_shift(wide, np.uint32(16), out=wide).view(np.float32)


def short(text: object, limit: int = 80) -> str:
    """Fit for a message of one line, whatever a stranger's file named it."""
    printable = ascii(str(text))[1:-1]
    return printable if len(printable) <= limit else f"{printable[: limit - 3]}..."
