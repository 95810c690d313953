"""Weight files: the only room that reads or writes them."""

from src.weights.checkpoint import (
    LoadReport,
    load_state,
    load_weights,
    make_readable,
    save_checkpoint,
    sha256_of,
)

__all__ = [
    "LoadReport",
    "load_state",
    "load_weights",
    "make_readable",
    "save_checkpoint",
    "sha256_of",
]
