"""Opens the images of a split as a configuration says: selected, checked and labelled."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.build import build_preprocessing, check_values
from src.config import Config, DataConfig
from src.data import (
    Source,
    balanced_subset,
    check_files,
    drop_broken,
    hold_out,
    missing_classes,
    open_source,
    select_classes,
)
from src.data.base import normalize_name
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError, join_names
from src.progress import progress_bar

logger = logging.getLogger("cvt")

WITH_FOLDERS = "imagefolder", "mindrecord"
INDEX_FILE = "images.json"  # in a run's folder


def open_split(config: Config, split: str) -> Source:
    """Open the images of "train" or "val", labelled in the order of `data.class_names`.

    Raises:
        UserError: the data or a key of `data` is invalid.
    """
    data = config.data
    folders = {"train_folder": data.train_folder, "val_folder": data.val_folder}
    for key in ("classes", "class_names"):
        names = getattr(data, key)
        twice = [name for name, count in Counter(names or ()).items() if count > 1]
        if names is not None and (twice or not names):
            what = f"names {join_names(twice)} more than once" if twice else "is empty"
            raise UserError(f"data.{key}: {what}; name each class once")
    held_out = data.val_from_train is not None
    if held_out and split == "val" and data.val_folder != DataConfig.val_folder:
        logger.warning(
            "data.val_folder %s is not used, because data.val_from_train %d holds out training "
            "images; to evaluate on the folder, add --data.val_from_train null",
            data.val_folder, data.val_from_train,
        )  # fmt: skip
    opened = "train" if held_out else split
    key = f"{opened}_folder"
    if data.source not in WITH_FOLDERS and folders[key] != getattr(DataConfig, key):
        logger.warning(
            "data.%s %s is not used, because data.source %s has no such folder; leave it out",
            key, folders[key], data.source,
        )  # fmt: skip
    # A run holds images out from all of its classes, whichever of them are evaluated.
    classes = data.class_names if held_out and data.classes and data.class_names else data.classes
    source = open_source(
        data.source,
        data.path,
        opened,
        class_names=data.class_names,
        selected=classes,
        **folders,
    )
    if classes:
        source = select_classes(source, classes, data.class_names)
    if split == "train":
        _check_train_classes(source, data)
    if held_out:  # the same images for any runtime.seed, so that trials are comparable
        source = hold_out(source, data.val_from_train, seed=0)[split == "val"]
    if classes != data.classes:
        source = select_classes(source, data.classes, data.class_names)
    if data.train_images and split == "train":
        classes = len(set(source.labels.tolist()))
        if data.train_images < classes:
            raise UserError(
                f"data.train_images {data.train_images}: {source.title} has {classes} classes; "
                "give one image for each, or more"
            )
        source = balanced_subset(source, data.train_images, config.runtime.seed)
    if split == "val":
        _warn_absent_classes(source, data)
    return source


def _check_train_classes(source: Source, data: DataConfig) -> None:
    """Check which classes have images to train on.

    `data.class_names` may name more classes than the data have, such as those of pretrained
    weights; `data.classes` may not.

    Raises:
        UserError: fewer than two classes have images, or one of the data's own has none.
    """
    present = [source.class_names[label] for label in np.unique(source.labels)]
    if len(present) < 2:
        found = f"only one class ({present[0]!r}) has images" if present else "no images"
        raise UserError(
            f"{source.title}: {found}; training needs two or more: add class folders, or name more "
            "in data.classes"
        )
    absent = _describe_absent(source, data.classes or source.class_names)
    if absent and (data.classes or not data.class_names):
        raise UserError(f"{source.title}: {absent}; add some, or name the others in data.classes")
    if absent:
        logger.warning("%s: %s", source.title, absent)


def _warn_absent_classes(source: Source, data: DataConfig) -> None:
    """Warn about classes without images to evaluate on, whose accuracy stays unknown."""
    absent = _describe_absent(source, data.classes or source.class_names)
    if absent and data.val_from_train is not None:
        logger.warning("data.val_from_train %d holds out %s", data.val_from_train, absent)
    elif absent:
        logger.warning("%s: %s", source.title, absent)


def _describe_absent(source: Source, names: Sequence[str]) -> str:
    """Return which of these classes have no images; empty if all have some."""
    present = {normalize_name(source.class_names[label]) for label in np.unique(source.labels)}
    absent = [name for name in names if normalize_name(name) not in present]
    if not absent:
        return ""
    return f"no images of {len(absent)} of {len(names)} classes: {join_names(absent)}"


def open_quietly(config: Config, split: str) -> Source:
    """Call `open_split` without logging, to check a split that is opened again later."""
    logger.disabled = True
    try:
        return open_split(config, split)
    finally:
        logger.disabled = False


def open_checked(
    config: Config,
    split: str,
    ranks: Ranks = SINGLE_PROCESS,
    run: Path | None = None,
    *,
    keep: bool = True,
    source: Source | None = None,
    sample: bool = False,
) -> Source:
    """Open a split as `open_split` does, without broken images; the ranks share the check.

    Args:
        config: the recipe.
        split: "train" or "val".
        ranks: the ranks that open the split.
        run: a run's folder for the index of the images unless `data.index` is set.
        keep: whether to write the index; False for a configuration that came with a checkpoint,
            which must not decide where files are written.
        source: the result of `open_split` if it was called before.
        sample: `source` has only some images, so a class may lose all of them.

    Raises:
        UserError: more images are broken than may be skipped.
    """
    if split == "train":
        check_values(config)
    else:
        build_preprocessing(config)
    data = config.data
    if source is None:
        source = open_split(config, split)
        if split == "train" and len(source) and source.file(0) is not None:
            open_quietly(config, "val")  # report its errors before any image is read
    ranks.require_agreement(f"{split} images", source.digest())
    if not len(source) or source.file(0) is None:
        return source
    if not data.check_images:
        logger.warning(
            "%s: images are not checked (data.check_images): a broken one stops the run when it is "
            "read, and a damaged header can end it without a message", source.title
        )  # fmt: skip
        return source
    index = Path(os.path.expanduser(data.index)) if data.index else run and run / INDEX_FILE
    files = [source.file(k) for k in range(len(source))]
    entries = check_files(
        files, Path(os.path.expanduser(data.path)), index,
        write=keep, workers=data.workers, progress=progress_bar, ranks=ranks,
    )  # fmt: skip
    source.set_sizes([entry.size for entry in entries])
    faults = {k: entry.fault for k, entry in enumerate(entries) if entry.fault}
    turned = sum(entry.turned for entry in entries)
    source.inflated = bool(turned)
    if turned and ranks.is_first:
        logger.info("%s: images rotated as their EXIF data says: %d", source.title, turned)
    skips = data.broken == "skip" or (data.broken == "auto" and split == "train")
    raise_limit = f"or raise data.broken_share (now {data.broken_share:g})"
    remedy = raise_limit if skips else "or skip them with --data.broken skip"
    kept = drop_broken(source, faults, data.broken_share if skips else 0.0, remedy)
    lost = [] if sample else missing_classes(source, kept)
    if lost:
        message = f"{source.title}: no image of {join_names(lost)} can be read"
        if split == "train":
            raise UserError(f"{message}; replace them, or remove the class folder")
        logger.warning(message)
    return kept


def absolute_path(path: str | None) -> str | None:
    """Return a path of a configuration as one that holds in any folder, without ~ and links."""
    return path and os.path.realpath(os.path.expanduser(path))


def resolve_classes(config: Config, source: Source) -> Config:
    """Return the configuration with the data's classes and absolute paths.

    Raises:
        UserError: `model.num_classes` differs from the number of classes.
    """
    names = list(source.class_names)
    classes = config.model.num_classes or len(names)
    if classes != len(names):
        raise UserError(
            f"model.num_classes {classes}: {source.title} has {len(names)} classes; leave out "
            "the key, or name all classes in the order of the labels in data.class_names"
        )
    data = config.data
    path, index = map(absolute_path, (data.path, data.index))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=classes),
        data=dataclasses.replace(data, class_names=names, path=path, index=index),
    )
