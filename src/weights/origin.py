"""Read what the files beside weights tell about them: a run's config.yaml, or config.json."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mindspore import nn

from src.config import Config
from src.config_io import load_config, run_config_of
from src.data.base import normalize_name
from src.data.imagenet_labels import find_class_order_fault, imagenet_names
from src.errors import UserError
from src.json_reader import read_json
from src.models.layers import Attention

MAX_BYTES = 16 << 20  # of a .json
_MAX_CLASSES, _MAX_NAME = 100_000, 1_000
logger = logging.getLogger("cvt")


def run_settings(weights: str | Path) -> Config | None:
    """Return the configuration of the run that weights belong to, or None.

    Raises:
        UserError: the config.yaml is another program's, or damaged.
    """
    file = run_config_of(weights)
    return None if file is None else load_config(file)


def class_names_of(
    weights: str | Path, outputs: int | None = None, log: Callable[[str], object] = logger.info
) -> list[str] | None:
    """Return what the outputs of weights are called, and log where the names are from.

    Args:
        weights: the weight file or its folder.
        outputs: the number of the network's outputs; None for as many as are named.
        log: receives lines for the log.

    Returns:
        The class names of the weights' run; without a run, `id2label` of Hugging Face's config.json
        beside the weights, unless it says "LABEL_0" and so on; else None.
    """
    try:
        settings = run_settings(weights)
    except UserError as error:  # the weights may lie in another program's folder
        log(f"class names not read: {error}")
        settings = None
    if settings is not None and settings.data.class_names:
        names = settings.data.class_names
        return names if outputs in (None, len(names)) else None
    names = _hugging_face_names(_config_json(weights), outputs)
    if names:
        log(f"{weights}: classes are named as in its config.json")
    return names


def warn_other_settings(weights: str | Path, net: nn.Cell) -> None:
    """Log a warning if Hugging Face's config.json has settings that no tensor's shape shows."""
    try:
        settings = read_json(_config_json(weights), MAX_BYTES)
        own = dict(zip(("num_heads", "stride_kv", "qkv_projection_method"), _attention(net)))
        changed = [
            f"{key} {settings[key]}, not {values}"
            for key, values in own.items()
            if values and list(settings.get(key, values)) != values
        ]
    except (OSError, ValueError, AttributeError, TypeError):  # another program's file
        return
    if changed:
        logger.warning("%s: its config.json has %s", weights, "; ".join(changed))


def _attention(net: nn.Cell) -> tuple[list[int], list[int], list[str]]:
    """Return heads, stride of keys and values, and projection of each stage of a CvT."""
    stages = {}
    for name, cell in net.cells_and_names():
        if isinstance(cell, Attention):
            stages.setdefault(name.partition(".")[0], cell)
    cells = stages.values()
    return (
        [cell.num_heads for cell in cells],
        [cell.conv_proj_k.conv.stride[0] for cell in cells if cell.qkv_projection == "conv"],
        [{"conv": "dw_bn"}.get(cell.qkv_projection, cell.qkv_projection) for cell in cells],
    )


def are_same_classes(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether the outputs of weights are a data set's classes in their order.

    ImageNet's folders have the names of synsets, Hugging Face's outputs their words.
    """
    return [*map(normalize_name, names)] == [*map(normalize_name, classes)] or (
        are_imagenet(names) and find_class_order_fault(classes) is None
    )


def are_imagenet(names: Sequence[str]) -> bool:
    """Return whether names are ImageNet-1k's words in their order, up to a few spellings."""
    known = imagenet_names()
    same = sum(name == word for name, word in zip(names, known))
    return len(names) == len(known) and same >= 0.9 * len(known)


def check_class_names(names: Any) -> list[str]:
    """Return the names, [] for None. Raises ValueError: too many, too long, or not strings."""
    if names is None:
        return []
    if not isinstance(names, list) or len(names) > _MAX_CLASSES:
        raise ValueError(f"class_names must be a list of at most {_MAX_CLASSES} names")
    if not all(isinstance(name, str) and len(name) <= _MAX_NAME for name in names):
        raise ValueError(f"class_names must be strings of at most {_MAX_NAME} characters")
    return names


def _config_json(weights: str | Path) -> Path:
    return (Path(weights) if Path(weights).is_dir() else Path(weights).parent) / "config.json"


def _hugging_face_names(file: Path, outputs: int | None) -> list[str] | None:
    try:
        labels = read_json(file, MAX_BYTES)["id2label"]
        count = len(labels)
        if outputs not in (None, count):  # of another network, such as one with its old head
            return None
        names = check_class_names([labels[str(label)] for label in range(count)])
    except (OSError, ValueError, KeyError, TypeError):  # another program's file
        return None
    names = [name.encode("utf-8", "backslashreplace").decode() for name in names]
    return None if names == [f"LABEL_{label}" for label in range(count)] else names
