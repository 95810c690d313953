"""Read and write weight files."""

from src.weights.checkpoint import read_checkpoint, save_checkpoint, save_weights
from src.weights.files import unchanged, weight_files
from src.weights.load import load_state, load_weights
from src.weights.load_report import LoadReport, WeightsMismatch
from src.weights.pretrained import create_pretrained, list_pretrained, pretrained_folder

__all__ = [
    "LoadReport",
    "WeightsMismatch",
    "create_pretrained",
    "list_pretrained",
    "load_state",
    "load_weights",
    "pretrained_folder",
    "read_checkpoint",
    "save_checkpoint",
    "save_weights",
    "unchanged",
    "weight_files",
]
