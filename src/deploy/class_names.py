"""Names for the outputs of weights."""

from __future__ import annotations

import logging
from pathlib import Path

from src.data.imagenet_labels import CLASSES, imagenet_names
from src.weights.origin import class_names_of

logger = logging.getLogger("cvt")


def known_class_names(weights: Path, outputs: int) -> list[str] | None:
    """Return what the outputs of weights are called, and log where the names are from.

    Args:
        weights: the weight file or its folder.
        outputs: the number of the network's outputs.

    Returns:
        As `class_names_of`; else ImageNet-1k's names for 1,000 outputs; else None.
    """
    names = class_names_of(weights, outputs)
    if not names and outputs == CLASSES:
        names = imagenet_names()
        logger.info("%s: 1,000 outputs and no class names; named as ImageNet-1k's", weights)
    return names
