"""Names for the outputs of weights that no run trained here."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from src.data.imagenet_labels import CLASSES, imagenet_names
from src.deploy.description import MAX_BYTES, check_class_names

_log = logging.getLogger("cvt")


def known_class_names(weights: Path, outputs: int) -> list[str] | None:
    """Return what the outputs of published weights are called, and log where the names are from.

    Args:
        weights: the weight file or its folder.
        outputs: the number of the network's outputs.

    Returns:
        `id2label` of Hugging Face's config.json beside the weights, unless it says "LABEL_0" and so
        on; else ImageNet-1k's names for 1,000 outputs; else None.
    """
    place = weights if weights.is_dir() else weights.parent
    names = _hugging_face_names(place / "config.json", outputs)
    if names:
        _log.info("%s: classes are named as in its config.json", weights)
    elif outputs == CLASSES:
        names = imagenet_names()
        _log.info("%s: 1,000 outputs and no class names; named as ImageNet-1k's", weights)
    return names


def _hugging_face_names(file: Path, outputs: int) -> list[str] | None:
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return None
        labels = json.loads(file.read_text(encoding="utf-8"))["id2label"]
        names = check_class_names([labels[str(label)] for label in range(outputs)])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # another program's file
        return None
    names = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    return None if names == [f"LABEL_{label}" for label in range(outputs)] else names
