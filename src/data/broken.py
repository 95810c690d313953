"""What happens to a split's broken images: left out and counted, or the end of the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from src.data.base import Source
from src.data.subset import Subset
from src.errors import UserError

_log = logging.getLogger("cvt")

_NAMED = 5  # broken images that a message names


def leave_out(source: Source, faults: dict[int, str], share: float, remedy: str) -> Source:
    """The source without its broken images, which are counted in the log.

    Args:
        source: the split.
        faults: what is wrong with item `index`.
        share: the part of the images that may be broken; 0 allows none.
        remedy: what the user can do, for the message.

    Raises:
        UserError: more are broken, or all.
    """
    if not faults:
        return source
    count = f"{len(faults)} of {len(source)} images of {source.title} can't be read"
    named = _named(source, sorted(faults), faults)
    if len(faults) > share * len(source) or len(faults) == len(source):
        raise UserError(f"{count}: {named}; remove or replace them, {remedy}")
    _log.warning("left out: %s (%.2f %%): %s", count, 100 * len(faults) / len(source), named)
    kept = np.setdiff1d(np.arange(len(source)), list(faults))
    return Subset(source, kept, source.labels[kept], source.class_names)


def lost_classes(source: Source, kept: Source) -> list[str]:
    """Names of the classes that have images in `source` and none in `kept`."""
    lost = np.setdiff1d(source.labels, kept.labels)
    return [source.class_names[label] for label in lost]


def _named(source: Source, indices: Sequence[int], faults: dict[int, str]) -> str:
    named = "; ".join(f"{source.describe(k)}: {faults[k]}" for k in indices[:_NAMED])
    rest = len(indices) - _NAMED
    return f"{named}; and {rest} more" if rest > 0 else named
