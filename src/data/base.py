"""What a data set is to the rest: random access, `source[i]` is one image and its label."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence

import mindspore.dataset as ds
import numpy as np


class Source:
    """One split of a data set. `encoded` tells what `source[i]` returns with its np.int32 label:

    True: the bytes of an image file, uint8 [bytes]; False: the pixels, uint8 [H, W, 3], RGB.
    """

    encoded: bool

    def __init__(self, labels: np.ndarray, class_names: Sequence[str], title: str):
        self.labels = np.ascontiguousarray(labels, np.int32)  # [N]
        self.class_names = tuple(class_names)
        self.title = title
        # Bytes of each file that reaches MindSpore's decoder as it is, once `prepare` has said so.
        self.straight = np.full(len(self.labels), -1, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        raise NotImplementedError

    def image_dataset(self, indices: np.ndarray, workers: int) -> ds.Dataset | None:
        """These items in this order, as a MindSpore dataset with the one column "image".

        None where MindSpore has no reader of its own: then `source[i]` is read. `workers` is how
        many threads it may read with.
        """
        return None

    def describe(self, index: int) -> str:
        """Where item `index` comes from, for messages to people."""
        return f"image {index} of {self.title}"

    def file(self, index: int) -> str | None:
        """The image file that holds item `index` alone, if there is one."""
        return None

    def digest(self, *, by_name: bool = False) -> int:
        """A checksum over every item and label, and the classes, in their order.

        Args:
            by_name: take the items' descriptions even where that means to read them, as states of
                MindRecord runs did before shards stood for their items.
        """
        number = zlib.crc32(repr(self.class_names).encode(), zlib.crc32(self.labels))
        return self.digest_items(np.arange(len(self)), number, by_name)

    def digest_items(self, indices: np.ndarray, number: int, by_name: bool = False) -> int:
        """Continue a checksum over some items: their descriptions, or what stands for them."""
        for index in indices:
            text = self.describe(int(index))
            number = zlib.crc32(text.encode("utf-8", "surrogateescape"), number)
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


def some_names(names: Sequence[str], limit: int = 10) -> str:
    """At most `limit` names, for messages."""
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def legible(name: str) -> str:
    """A folder's name as a class name: bytes that are not UTF-8 become escapes, as `\\xe9`.

    Python holds such bytes as lone surrogates, which YAML, ONNX and fonts refuse.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def canonical(name: str) -> str:
    """What names are compared by: "é" is one code point or two, by the system it is from."""
    return unicodedata.normalize("NFC", legible(name))
