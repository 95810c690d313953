"""Find the class folders of a split and the images below a folder."""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from src.data.base import normalize_name
from src.errors import UserError, join_names

logger = logging.getLogger("cvt")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp")
# Created by NAS devices, file systems, desktops and archivers, in any case: thumbnails, waste
# baskets, snapshots, resource forks.
_SYSTEM_FOLDERS = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "lost+found",
    "$recycle.bin", "system volume information", "__macosx",
}  # fmt: skip
_THUMBNAILS = {"@eadir", "__macosx"}  # copies of images that are elsewhere


class Walk:
    """Lists the images below some folders and visits every real directory once.

    Symbolic links to directories are followed unless they lead to a parent of these folders, into
    one of them, or to the target of an earlier link. Otherwise a looping link would multiply images
    and count those of one class for another.

    Args:
        folders: the roots of the walk, such as all class folders of a split.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._folders = [os.path.abspath(folder) for folder in folders]

    @functools.cached_property
    def _visited(self) -> set[tuple[int, int]]:
        """The real directories that no link may lead to; collected at the first link."""
        visited = set()
        for folder in self._folders:
            for path in (Path(folder), Path(folder).resolve()):
                visited.update(map(_identity, path.parents))
            for place, folders, _ in os.walk(folder, onerror=_refuse):
                folders[:] = filter(is_visible, folders)
                visited.add(_identity(place))
        return visited

    def list_images(self, folder: str | Path) -> tuple[list[str], list[str]]:
        """Return images and other files at any depth, sorted, without hidden ones."""
        images, others, refused, through_links = [], [], [], set()
        for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
            entered = []
            for name in sorted(filter(is_visible, folders)):
                path = os.path.join(place, name)
                if os.path.islink(path) or place in through_links:
                    if _identity(path) in self._visited:
                        refused.append(path)
                        continue
                    self._visited.add(_identity(path))
                    through_links.add(path)
                entered.append(name)
            folders[:] = entered
            for name in sorted(filter(is_visible, names)):
                path = os.path.join(place, name)
                known = name.lower().endswith(IMAGE_EXTENSIONS) and not _is_special(path)
                (images if known else others).append(path)
        if refused:
            logger.warning(
                "%s: did not follow links (%d) to folders that are already read, such as %s",
                folder, len(refused), refused[0],
            )  # fmt: skip
        return images, others


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}; make the folder readable") from None


def list_images(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the images and the other files below one folder, as `Walk.list_images`."""
    return Walk([folder]).list_images(folder)


def is_visible(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor created by a system."""
    return name[0] != "." and name.lower() not in _SYSTEM_FOLDERS


def list_class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted; as integers if all are (ImageNet-V2's 0..999).

    Raises:
        UserError: two names look alike or are the same folder, or one is a link to a parent folder
            or into another class.
    """
    names = _natural([entry.name for entry in os.scandir(folder) if _is_class(entry)])
    around = {_identity(path) for path in (folder.resolve(), *folder.resolve().parents)}
    by_identity, by_name = {}, {}
    real = {name: (folder / name).resolve() for name in names}
    of_path = {path: name for name, path in real.items()}
    for name in names:
        identity = _identity(folder / name)
        if identity in around:
            raise UserError(f"{folder / name}: is a link to a folder that holds it; remove it")
        for known, key in ((by_identity, identity), (by_name, normalize_name(name))):
            if known.setdefault(key, name) != name:
                same = (
                    "the same folder" if known is by_identity else "spelled with other code points"
                )
                raise UserError(
                    f"{folder / name}: is {same} as {known[key]!r}; keep one of the two classes"
                )
        if os.path.islink(folder / name):
            holder = next((of_path[p] for p in real[name].parents if p in of_path), None)
            if holder is not None:
                raise UserError(f"{folder / name}: is a link into the class {holder!r}; remove it")
    return names


def find_classes(folder: Path, split: str) -> list[str]:
    """Return the class folders of a split.

    Raises:
        UserError: there are none, or the classes are one level deeper.
    """
    found = list_class_folders(folder)
    _log_ignored_folders(folder)
    if not found:
        images = [entry.name for entry in os.scandir(folder) if _is_image(entry)]
        if images:
            raise UserError(
                f"{folder}: images ({len(images)}), such as {images[0]}, but no class folders; "
                f"move each image into the folder of its class, {folder.name}/<class>/{images[0]}"
            )
        raise UserError(f"{folder}: no class folders in it; it should hold <class>/*.jpg")
    place, inner, with_images, seen = folder, found, False, set()
    while len(inner) == 1 and _identity(place / inner[0]) not in seen:
        place /= inner[0]
        seen.add(_identity(place))  # a link may lead back
        entries = list(os.scandir(place))
        inner = sorted(entry.name for entry in entries if _is_class(entry))
        with_images = with_images or any(map(_is_image, entries))
    # One class is enough for validation, but not for training.
    if place != folder and len(inner) > 1 and (split == "train" or not with_images):
        raise UserError(
            f'{folder}: only one class ("{found[0]}"). It contains sub-folders '
            f"({join_names(inner, 3)}); did you mean {place}? Give --data.{split}_folder "
            f"{place.relative_to(folder.parent)}"
        )
    return found


def holds_class_folders(folder: Path) -> bool:
    """Return whether a folder directly inside this one holds an image."""
    inside = (entry.path for entry in os.scandir(folder) if _is_class(entry))
    return any(_is_image(entry) for path in inside for entry in os.scandir(path))


def _log_ignored_folders(folder: Path) -> None:
    """Log the hidden folders and those of a system, if they hold images: one may be a class."""
    for entry in os.scandir(folder):
        ignored = not is_visible(entry.name) and entry.name.lower() not in _THUMBNAILS
        if ignored and entry.is_dir():
            files = (file for _, _, names in os.walk(entry.path) for file in names)
            if any(is_visible(file) and file.lower().endswith(IMAGE_EXTENSIONS) for file in files):
                logger.info(
                    "%s: left out with its images, because folders of this name are hidden or a "
                    "system's; rename it if it is a class", entry.path,
                )  # fmt: skip


def list_loose_files(folder: Path) -> list[str]:
    """Return the files beside the class folders."""
    return [
        entry.path for entry in os.scandir(folder) if entry.is_file() and is_visible(entry.name)
    ]


def _natural(names: Sequence[str]) -> list[str]:
    """Sort names; as integers if all are, so that "10" comes after "9"."""
    integers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if integers else None)


def _is_class(entry: os.DirEntry) -> bool:
    return entry.is_dir() and is_visible(entry.name)


def _is_image(entry: os.DirEntry) -> bool:
    known = entry.name.lower().endswith(IMAGE_EXTENSIONS)
    return known and entry.is_file() and is_visible(entry.name)


def _is_special(path: str) -> bool:
    """Return whether a path is a pipe, socket or device, on which a read may block forever."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False  # a dangling link, which the check of images reports


def _identity(path: str | Path) -> tuple[int, int]:
    """Return a directory's device and inode; (-1, -1) if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino
