"""Weight files: the only room that reads or writes them."""

from src.weights.checkpoint import save_checkpoint, save_weights, sha256_of
from src.weights.load import WEIGHT_SUFFIXES, load_state, load_weights
from src.weights.report import LoadReport, WeightsMismatch

__all__ = [
    "WEIGHT_SUFFIXES",
    "LoadReport",
    "WeightsMismatch",
    "load_state",
    "load_weights",
    "save_checkpoint",
    "save_weights",
    "sha256_of",
]
