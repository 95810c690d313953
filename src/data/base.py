"""The data set interface: random access, `source[i]` is one image and its label."""

from __future__ import annotations

import copy
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import mindspore.dataset as ds
import numpy as np

from src.data.images import make_decodable


class Source:
    """One split of a data set: `source[i]` is an image and its np.int32 label.

    If `encoded`, the image is the content of an image file, uint8 [bytes]; otherwise its pixels,
    uint8 [H, W, 3], RGB. Subclasses read by `item`, the image's position in the whole split;
    `subset` chooses and orders items. `inflated` is True if some images, such as photographs with
    EXIF rotation, are passed to MindSpore as bitmaps, which are large.
    """

    encoded: bool
    inflated = False

    def __init__(self, labels: np.ndarray, class_names: Sequence[str], title: str):
        self.labels = np.ascontiguousarray(labels, np.int32)  # [N]
        self.class_names = tuple(class_names)
        self.title = title
        self.items = np.arange(len(self.labels))  # [N]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        return self.read(int(self.items[index])), self.labels[index]

    def subset(
        self,
        indices: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Source:
        """Return a view of some images, in the order of `indices`.

        Args:
            indices: int [N]; an index may occur several times.
            labels: new labels, int [N].
            class_names: new names, in the order of the labels.
        """
        part = copy.copy(self)
        part.items = self.items[indices]
        part.labels = np.ascontiguousarray(
            self.labels[indices] if labels is None else labels, np.int32
        )
        part.class_names = self.class_names if class_names is None else tuple(class_names)
        return part

    def read(self, item: int) -> np.ndarray:
        """Read an image."""
        raise NotImplementedError

    def read_decodable(self, index: int) -> np.ndarray:
        """Read an image as `vision.Decode` takes it, if it is encoded."""
        return self[index][0]

    def image_dataset(self, workers: int) -> ds.Dataset | None:
        """Return MindSpore's own reader of these images, with the single column "image".

        Args:
            workers: the maximum number of reading threads.

        Returns:
            None if MindSpore has no such reader; the pipeline then uses `read_decodable`.
        """
        return None

    def describe(self, index: int) -> str:
        """Return where an image comes from, for messages."""
        return f"image {self.items[index]} of {self.title}"

    def file(self, index: int) -> str | None:
        """Return the path of an image that has a file of its own, else None."""
        return None

    def name(self, index: int) -> str | None:
        """Return the path of an image's own file within the split, else None."""
        return None

    def digest(self) -> int:
        """Return a checksum over all images, labels and class names, in order."""
        number = zlib.crc32(repr(self.class_names).encode(), zlib.crc32(self.labels))
        return self.digest_items(number)

    def digest_items(self, number: int) -> int:
        """Continue a checksum by what identifies the images wherever they lie."""
        return _digest_texts(map(self.describe, range(len(self))), number)

    def digest_content(self) -> int:
        """Return a checksum of what the images hold, as far as it is quick; 0 if it is not."""
        return 0


def _digest_texts(texts: Iterable[str], number: int) -> int:
    for text in texts:
        number = zlib.crc32(text.encode("utf-8", "surrogateescape"), number)
    return number


class ArraySource(Source):
    """Images in memory: uint8 [N, H, W, 3], or grey [N, H, W], returned with three channels."""

    encoded = False

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], title: str
    ):
        super().__init__(labels, class_names, title)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
            raise ValueError(f"{title}: {images.dtype} {images.shape} for {len(labels)} labels")
        self._images = images

    def read(self, item: int) -> np.ndarray:
        image = self._images[item]
        return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image

    def digest_content(self) -> int:
        """Return a checksum of all pixels."""
        return zlib.crc32(self._images[self.items])


class FileSource(Source):
    """Image files, read on access.

    Args:
        files: their paths.
        labels, class_names, title: see `Source`.
        folder: of the split; the checksum leaves it out, so that a data set may be moved.
    """

    encoded = True
    sizes: np.ndarray | None = None  # int64 [N], bytes of each of `files`; None if unknown

    def __init__(
        self,
        files: Sequence[str],
        labels: np.ndarray,
        class_names: Sequence[str],
        title: str,
        folder: Path | None = None,
    ):
        super().__init__(labels, class_names, title)
        self._files = list(files)
        self._prefix = "" if folder is None else str(folder / "_")[:-1]
        # The size of each file that `make_decodable` left unchanged.
        self._decodable_sizes = np.full(len(self._files), -1, np.int64)

    def read(self, item: int) -> np.ndarray:
        return np.fromfile(self._files[item], np.uint8)

    def read_decodable(self, index: int) -> np.ndarray:
        """Read an image as `vision.Decode` takes it.

        A file is inspected once; while its size stays the same, it counts as unchanged.
        """
        item = self.items[index]
        content = self.read(item)
        if self._decodable_sizes[item] == len(content):
            return content
        decodable = make_decodable(content)
        if decodable is content:
            self._decodable_sizes[item] = len(content)
        return decodable

    def describe(self, index: int) -> str:
        return self._files[self.items[index]]

    def file(self, index: int) -> str:
        return self._files[self.items[index]]

    def name(self, index: int) -> str:
        return self.file(index).removeprefix(self._prefix)

    def digest_items(self, number: int) -> int:
        """Continue a checksum over the files' paths within the folder."""
        names = map(self.name, range(len(self)))
        return _digest_texts(names, number)

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """Store the sizes of these images' files in bytes."""
        self.sizes = np.full(len(self._files), -1, np.int64)
        self.sizes[self.items] = sizes

    def digest_content(self) -> int:
        """Return a checksum of the files' sizes, if they are known."""
        return 0 if self.sizes is None else zlib.crc32(self.sizes[self.items])


def escape_undecodable(name: str) -> str:
    """Turn a folder's name into a class name: bytes that are not UTF-8 become `\\xe9`.

    Python holds such bytes as lone surrogates, which YAML, ONNX and fonts refuse.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def normalize_name(name: str) -> str:
    """Normalise a name for comparison: some systems spell "é" in one code point, others in two."""
    return unicodedata.normalize("NFC", escape_undecodable(name))
