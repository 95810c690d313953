"""Read a data set from a few MindRecord files instead of millions of small ones.

A split is a folder of shards, `00000.mindrecord` with MindSpore's own index `00000.mindrecord.db`,
and `index.json`, which `tools.records` writes last. Each record holds the content of an image file,
its path below the source folder and its label; any MindRecord reader can use them.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore.dataset as ds
import numpy as np

from src.data.base import Source, normalize_name
from src.data.images import make_decodable
from src.data.shards import (
    check_shard,
    require_readable,
    require_utf8,
    verify_shard,
    why_unreadable,
)
from src.errors import UserError, join_names
from src.json_reader import read_json
from src.progress import progress_bar

INDEX = "index.json"
UNFINISHED = "unfinished.json"  # the index of an unfinished conversion
FORMAT = 1
_SHARD_KEYS = ("bytes", "sha256", "index_bytes", "index_sha256", "head", "origin", "skipped")


class RecordSource(Source):
    """The images of one split in MindRecord shards; `open_records` checks and opens them.

    Args:
        folder: the folder of the shards.
        index: the content of index.json.
        labels: int [N], in the order of the records.
        class_names: names in the order of the labels.
        title: for messages.
    """

    encoded = True

    def __init__(
        self,
        folder: Path,
        index: dict[str, Any],
        labels: np.ndarray,
        class_names: Sequence[str],
        title: str,
    ) -> None:
        super().__init__(labels, class_names, title)
        self._folder = folder
        self._origin = index["source"]
        self._files = [str(folder / shard["name"]) for shard in index["shards"]]
        self._checksums = [shard["sha256"] for shard in index["shards"]]
        # Whether any record needs `make_decodable`, for example a photograph that EXIF turns.
        self.inflated = any(shard.get("unready") for shard in index["shards"])
        self._starts = np.cumsum([0] + [shard["images"] for shard in index["shards"]])
        # Opened on first use, because it keeps every shard open; shared by all subsets.
        self._open_single = functools.cache(
            lambda: ds.MindDataset(
                self._files, ["image", "file"], num_parallel_workers=1, shuffle=False
            )
        )

        self._names = functools.cache(self._read_names)
        self._first_class = index["class_names"][index["shards"][0]["labels"][0][0]]

    def _read_names(self) -> list[str]:
        records = ds.MindDataset(self._files, ["file"], num_parallel_workers=1, shuffle=False)
        try:
            rows = records.create_tuple_iterator(num_epochs=1, output_numpy=True)
            files = [str(row[0]).split("/") for row in rows]
        except RuntimeError as error:
            raise UserError(f"{self._folder}: {why_unreadable(error)}") from error
        # Within the split: from the class's folder on, whatever the split's folder was called.
        start = files[0].index(self._first_class) if self._first_class in files[0] else 0
        return ["/".join(parts[start:]) for parts in files]

    def read(self, item: int) -> np.ndarray:
        try:
            image = self._open_single()[item][0]
        except RuntimeError as error:
            raise OSError(f"{self._folder}: record {item} cannot be read") from error
        return np.frombuffer(image.tobytes(), np.uint8)

    def read_decodable(self, index: int) -> np.ndarray:
        """Read an image as `vision.Decode` takes it."""
        return make_decodable(self[index][0])

    def name(self, index: int) -> str:
        """Return the path of a record's original file within the split."""
        return self._names()[self.items[index]]

    def describe(self, index: int) -> str:
        """Return the original file of a record, and its shard."""
        item = int(self.items[index])
        shard = int(np.searchsorted(self._starts, item, "right")) - 1
        place = f"{self._files[shard]}, record {item - self._starts[shard]}"
        try:
            origin = os.path.join(self._origin, str(self._open_single()[item][1]))
        except RuntimeError:  # the shard is damaged beyond reading
            return place
        return f"{origin} (in {place})"

    def image_dataset(self, workers: int) -> ds.Dataset | None:
        """Return MindSpore's reader, whose threads read in parallel and keep the order.

        It takes no more indices than there are records: None for an epoch of several passes.
        """
        if len(self.items) > self._starts[-1]:
            return None
        sampler = ds.SubsetSampler(self.items.tolist())
        readers = _limit_readers(len(self._files), workers)
        dataset = ds.MindDataset(
            self._files, ["image"], num_parallel_workers=readers, sampler=sampler
        )
        if self.inflated:
            dataset = dataset.map(make_decodable, ["image"], num_parallel_workers=workers)
        return dataset

    def digest_items(self, number: int) -> int:
        """Continue a checksum by the shards' checksums, because the names are in the records."""
        number = zlib.crc32(np.ascontiguousarray(self.items, np.int64), number)
        return zlib.crc32("".join(self._checksums).encode(), number)


def open_records(
    folder: Path, title: str, class_names: Sequence[str] | None = None
) -> RecordSource:
    """Open one split written by tools.records, after a quick check of every shard.

    Args:
        folder: of the split.
        title: for messages.
        class_names: as in `open_source`.

    Raises:
        UserError: a shard is missing, of another size or from another set; an image's class is not
            in `class_names`; the system allows too few open files.
    """
    require_utf8(folder)
    index = read_index(folder)
    for shard in index["shards"]:
        check_shard(folder, shard)
    names = tuple(index["class_names"] if class_names is None else class_names)
    new_label = {normalize_name(name): label for label, name in enumerate(names)}
    runs = np.array([run for shard in index["shards"] for run in shard["labels"]])  # label, count
    present = [index["class_names"][label] for label in sorted(set(runs[:, 0].tolist()))]
    unknown = [name for name in present if normalize_name(name) not in new_label]
    if unknown:
        raise UserError(
            f"{folder}: {join_names(unknown, 5)}: none of the {len(names)} known classes "
            f"({join_names(names, 5)}); use the data set that the model was trained for"
        )
    table = np.array([new_label.get(normalize_name(name), -1) for name in index["class_names"]])
    labels = np.repeat(table[runs[:, 0]], runs[:, 1])
    _limit_readers(len(index["shards"]), 1)
    return RecordSource(folder, index, labels, names, title)


def _limit_readers(shards: int, wanted: int) -> int:
    """Return how many threads may read: MindSpore opens every shard in each, and once more.

    Raises this process's limit of open files as far as needed and allowed; half of it is for a
    second pipeline, such as evaluation during training.

    Raises:
        UserError: the limit does not even allow one thread.
    """
    import resource  # not on Windows, where importing `Predictor` must give a clear message

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + 2 * shards * (wanted + 1)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return wanted
    limit = needed if most == resource.RLIM_INFINITY else min(needed, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    readers = (limit - 256) // (2 * shards) - 1
    if readers < 1:
        raise UserError(
            f"{shards} MindRecord shards need {256 + 4 * shards} open files, the system allows "
            f"{limit}; raise it with ulimit -n, or convert with a larger --images_per_shard"
        )
    return min(wanted, readers)


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a finished split.

    Raises:
        UserError: the index is missing or damaged, or the conversion is unfinished.
    """
    path = folder / INDEX
    if not path.is_file():
        if (folder / UNFINISHED).is_file():
            raise UserError(f"{folder}: its conversion is unfinished; run tools.records again")
        raise UserError(
            f"{folder}: no {INDEX} of MindRecord shards in it; make them with "
            f"python -m tools.records --src IMAGEFOLDER --dst {folder.parent}"
        )
    return load_index(path)


def load_index(path: Path) -> dict[str, Any]:
    """Read an index file, finished or not, and check its structure.

    Raises:
        UserError: it is damaged or of another version.
    """
    try:
        index = read_json(path)
        version, classes, images = index["format"], len(index["class_names"]), 0
        for shard in index["shards"]:
            counts = [count for label, count in shard["labels"] if 0 <= label < classes]
            if sum(counts) != shard["images"] or len(counts) != len(shard["labels"]):
                raise ValueError(f"labels and images of {shard['name']} disagree")
            images += shard["images"]
            for key in _SHARD_KEYS:
                shard[key]
        if path.name == INDEX and (images != index["images"] or not images):
            raise ValueError(f"{images} images in the shards, {index['images']} in all")
        for key in ("source", "listing", "images_per_shard", "skip_broken"):
            index[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged, or not written by tools.records ({error!r}); copy it again, or "
            "remove it and convert again with --force"
        ) from error
    if version != FORMAT:
        raise UserError(f"{path}: format {version}, this version reads {FORMAT}; convert again")
    return index


def verify(root: Path) -> dict[Path, int]:
    """Verify the checksum of every shard of every split at or below `root`.

    Returns:
        The number of images by split folder.

    Raises:
        UserError: there is no split, one is unfinished, a shard has changed, or MindSpore can't
            open the shards together.
    """
    folders = sorted({path.parent for name in (INDEX, UNFINISHED) for path in root.rglob(name)})
    if not folders:
        raise UserError(f"{root}: no MindRecord split in it; give a folder of tools.records")
    splits = {folder: read_index(folder) for folder in folders}
    images = {folder: index["images"] for folder, index in splits.items()}
    with progress_bar(sum(images.values()), "verify") as bar:
        for folder, index in splits.items():
            for shard in index["shards"]:
                verify_shard(folder, shard)
                bar.update(shard["images"])
            require_readable(folder, [shard["name"] for shard in index["shards"]])
    return images
