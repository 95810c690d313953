"""Data sets, their images and batches.

`sources` opens data sets, `transforms` and `augment` have the operations, `loader` makes batches.
"""

from src.data.augment import create_train_operations
from src.data.base import ArraySource, FileSource, Source
from src.data.image_index import check_files
from src.data.loader import DataLoader, create_eval_loader, create_train_loader
from src.data.mixing import Mixing
from src.data.sources import open_source
from src.data.subset import balanced_subset, drop_broken, hold_out, missing_classes, select_classes
from src.data.transforms import Preprocessing

__all__ = [
    "ArraySource",
    "DataLoader",
    "FileSource",
    "Mixing",
    "Preprocessing",
    "Source",
    "balanced_subset",
    "check_files",
    "create_eval_loader",
    "create_train_loader",
    "create_train_operations",
    "drop_broken",
    "hold_out",
    "missing_classes",
    "open_source",
    "select_classes",
]
