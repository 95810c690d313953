"""Image folders: which files below a folder are images, and which folders are classes."""

from __future__ import annotations

import functools
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from src.data.base import canonical, some_names
from src.errors import UserError

_log = logging.getLogger("cvt")

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp")
# Thumbnails, waste and archives' leftovers of NAS devices and desktops.
_NOT_DATA = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX")


class Walk:
    """Lists the images below some folders and visits every real directory once.

    Symbolic links to directories are followed unless they lead to a folder around the walked ones,
    into one of them, or where an earlier link led: else a link that loops multiplies images, and
    files those of one class under another.

    Args:
        folders: the roots of the walk, as all class folders of a split.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._folders = [os.path.abspath(folder) for folder in folders]

    @functools.cached_property
    def _taken(self) -> set[tuple[int, int]]:
        """Real directories that no link may lead to; made when the first link is met."""
        taken = set()
        for folder in self._folders:
            for path in (Path(folder), Path(folder).resolve()):
                taken.update(map(_identity, path.parents))
            for place, folders, _ in os.walk(folder):
                folders[:] = filter(is_data, folders)
                taken.add(_identity(place))
        return taken

    def images(self, folder: str | Path) -> tuple[list[str], list[str]]:
        """Images and other files at any depth, sorted; hidden files and folders are not seen."""
        images, others, refused, through_links = [], [], [], set()
        for place, folders, names in os.walk(folder, followlinks=True):
            entered = []
            for name in sorted(filter(is_data, folders)):
                path = os.path.join(place, name)
                if os.path.islink(path) or place in through_links:
                    if _identity(path) in self._taken:
                        refused.append(path)
                        continue
                    self._taken.add(_identity(path))
                    through_links.add(path)
                entered.append(name)
            folders[:] = entered
            for name in sorted(filter(is_data, names)):
                path = os.path.join(place, name)
                known = name.lower().endswith(IMAGE_EXTENSIONS) and not _is_special(path)
                (images if known else others).append(path)
        if refused:
            _log.warning(
                "%s: did not follow %d links to folders that are read already, such as %s",
                folder, len(refused), refused[0],
            )  # fmt: skip
        return images, others


def images_below(folder: str | Path) -> tuple[list[str], list[str]]:
    """Images and other files below one folder, as `Walk.images`."""
    return Walk([folder]).images(folder)


def is_data(name: str) -> bool:
    """Whether a file or folder of that name is seen: no hidden one, none that a system made."""
    return name[0] != "." and name not in _NOT_DATA


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted; as integers if all are (ImageNet-V2's 0..999).

    Raises:
        UserError: two are one folder, a link to a folder around them, or names that look the same.
    """
    names = _natural([entry.name for entry in os.scandir(folder) if _is_class(entry)])
    around = {_identity(path) for path in (folder.resolve(), *folder.resolve().parents)}
    seen, spelt = {}, {}
    real = {name: (folder / name).resolve() for name in names}
    of_path = {path: name for name, path in real.items()}
    for name in names:
        identity = _identity(folder / name)
        if identity in around:
            raise UserError(f"{folder / name}: is a link to a folder that holds it; remove it")
        for known, key in ((seen, identity), (spelt, canonical(name))):
            if known.setdefault(key, name) != name:
                same = "the same folder" if known is seen else "spelt alike, in other code points,"
                raise UserError(
                    f"{folder / name}: is {same} as {known[key]!r}; keep one of the two classes"
                )
        if os.path.islink(folder / name):
            holder = next((of_path[p] for p in real[name].parents if p in of_path), None)
            if holder is not None:
                raise UserError(f"{folder / name}: is a link into the class {holder!r}; remove it")
    return names


def require_classes(folder: Path, split: str) -> list[str]:
    """The class folders of a split.

    Raises:
        UserError: there are none, or the classes lie a level deeper.
    """
    found = class_folders(folder)
    if not found:
        images = [entry.name for entry in os.scandir(folder) if _is_image(entry)]
        if images:
            raise UserError(
                f"{folder}: {len(images)} images, such as {images[0]}, but no class folders; move "
                f"each image into the folder of its class, {folder.name}/<class>/{images[0]}"
            )
        raise UserError(f"{folder}: no class folders in it; it should hold <class>/*.jpg")
    if len(found) == 1:
        inner = [entry.name for entry in os.scandir(folder / found[0]) if _is_class(entry)]
        images = any(map(_is_image, os.scandir(folder / found[0])))
        if len(inner) > 1 and not images:
            raise UserError(
                f'{folder}: only one class ("{found[0]}"). It contains sub-folders '
                f"({some_names(sorted(inner), 3)}); did you mean {folder / found[0]}? Give "
                f"--data.{split}_folder {folder.name}/{found[0]}"
            )
    return found


def loose_files(folder: Path) -> list[str]:
    """Files beside the class folders."""
    return [entry.path for entry in os.scandir(folder) if entry.is_file() and is_data(entry.name)]


def _natural(names: Sequence[str]) -> list[str]:
    """Sorted; as integers if all are, where "10" comes after "9"."""
    integers = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if integers else None)


def _is_class(entry: os.DirEntry) -> bool:
    return entry.is_dir() and is_data(entry.name)


def _is_image(entry: os.DirEntry) -> bool:
    known = entry.name.lower().endswith(IMAGE_EXTENSIONS)
    return known and entry.is_file() and is_data(entry.name)


def _is_special(path: str) -> bool:
    """Whether a path is a pipe, socket or device, which would be waited for without end."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False  # a link to nothing; the check of images reports it


def _identity(path: str | Path) -> tuple[int, int]:
    """What a directory is, whatever its name; (-1, -1) if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino
