"""Images in, batches out.

`sources` are data sets, `transforms` and `augment` the operations, `loader` makes batches.
"""

from src.data.augment import train_operations
from src.data.base import ArraySource, FileSource, Source
from src.data.broken import leave_out, lost_classes
from src.data.index import check_files
from src.data.loader import Batches, epoch_indices, eval_batches, find_broken, train_batches
from src.data.mixing import Mixing
from src.data.sources import SOURCES, open_source
from src.data.subset import balanced, hold_out, only_classes
from src.data.transforms import Preprocessing

__all__ = [
    "SOURCES",
    "ArraySource",
    "Batches",
    "FileSource",
    "Mixing",
    "Preprocessing",
    "Source",
    "balanced",
    "check_files",
    "epoch_indices",
    "eval_batches",
    "find_broken",
    "hold_out",
    "leave_out",
    "lost_classes",
    "only_classes",
    "open_source",
    "train_batches",
    "train_operations",
]
