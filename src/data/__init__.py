"""Images in, batches out: `sources` (data sets), `transforms` (operations), `loader` (batches)."""

from src.data.base import ArraySource, FileSource, Source
from src.data.loader import Batches, epoch_indices, eval_batches, find_broken, train_batches
from src.data.sources import SOURCES, open_source
from src.data.subset import balanced, only_classes
from src.data.transforms import Preprocessing, train_operations

__all__ = [
    "SOURCES",
    "ArraySource",
    "Batches",
    "FileSource",
    "Preprocessing",
    "Source",
    "balanced",
    "epoch_indices",
    "eval_batches",
    "find_broken",
    "only_classes",
    "open_source",
    "train_batches",
    "train_operations",
]
