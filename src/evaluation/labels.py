"""The images to evaluate on, with the labels that `data.labels` asks for."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from src.build import open_checked
from src.config import Config
from src.config_io import run_config_of
from src.data import Source
from src.data.imagenet_labels import (
    V2_FOLDERS,
    check_class_order,
    class_order_fault,
    load_real,
    with_real,
    with_v2,
)
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError


class Labelled(NamedTuple):
    """A split and, under ReaL, the right classes of each of its images."""

    source: Source
    label_lists: list[list[int]] | None = None


def open_labelled(
    config: Config, checkpoint: str, ranks: Ranks = SINGLE_PROCESS, keep_index: bool = False
) -> Labelled:
    """The held-out images of a configuration, checked, under its protocol of labels.

    Args:
        config: the recipe.
        checkpoint: its run knows images already.
        ranks: those that open the split.
        keep_index: whether to write the index of images.

    Raises:
        UserError: images, classes or labels that can't be used.
    """
    data = config.data
    if data.labels_file and data.labels != "real":
        raise UserError(
            f"data.labels_file {data.labels_file}: is ReaL's; add --data.labels real, or leave it "
            "out"
        )
    real = load_real(data.labels_file) if data.labels == "real" else None
    if data.labels != "val":
        _check_keys(config)
    if data.labels == "v2":
        config = dataclasses.replace(
            config, data=dataclasses.replace(data, class_names=list(V2_FOLDERS))
        )
    run = run_config_of(checkpoint)
    source = open_checked(config, "val", ranks, run and run.parent, keep=keep_index)
    given = bool(data.class_names or data.classes)
    check_class_order(source, given, data.labels, config.model.num_classes)
    if real is not None:
        ranks.require_agreement("labels of ReaL", real)
        return Labelled(*with_real(source, real))
    return Labelled(with_v2(source) if data.labels == "v2" else source)


def _check_keys(config: Config) -> None:
    """Refuse classes under which ImageNet's labels would mean others."""
    data = config.data
    if data.source not in ("imagefolder", "mindrecord"):
        raise UserError(
            f"data.labels {data.labels}: is of ImageNet, data.source is {data.source}; leave it out"
        )
    if data.classes:
        raise UserError(
            f"data.classes: ImageNet's labels {data.labels} are of all classes; leave it out"
        )
    fault = class_order_fault(data.class_names) if data.class_names else None
    if fault:
        raise UserError(
            f"data.labels {data.labels}: the model's classes are not ImageNet-1k's in their order: "
            f"{fault}; evaluate it with data.labels val"
        )
