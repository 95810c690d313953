"""MindRecord: a data set in a few large files instead of millions of small ones.

A split is a folder of shards, `00000.mindrecord` with MindSpore's own index `00000.mindrecord.db`,
and `index.json`, which `tools.records` writes last. Each record holds the bytes of an image file,
its path below the source folder and its label, which other readers of MindRecord can use.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore.dataset as ds
import numpy as np

from src.data.base import Source, canonical, some_names
from src.data.images import prepare
from src.data.shards import check_shard, verify_shard
from src.errors import UserError
from src.progress import progress_bar

INDEX = "index.json"
UNFINISHED = "unfinished.json"  # the index of a conversion that is not through
FORMAT = 1


class RecordSource(Source):
    """The images of one split in MindRecord shards; `open_records` checks and opens them.

    Args:
        folder: where the shards lie.
        index: the content of index.json.
        labels: int [N], in the order of the records.
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
        # Records that vision.Decode alone would read wrong, as photographs that EXIF turns.
        self._unready = any(shard.get("unready") for shard in index["shards"])
        self._starts = np.cumsum([0] + [shard["images"] for shard in index["shards"]])

    @functools.cached_property
    def _single(self) -> ds.MindDataset:
        """For one record at a time; made when asked for, as it keeps the shards open."""
        columns = ["image", "file"]
        return ds.MindDataset(self._files, columns, num_parallel_workers=1, shuffle=False)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        try:
            image = self._single[int(index)][0]
        except RuntimeError as error:
            raise OSError(f"{self._folder}: record {index} cannot be read") from error
        return np.frombuffer(image.tobytes(), np.uint8), self.labels[index]

    def describe(self, index: int) -> str:
        """The shard, and the file that the record was made of."""
        shard = int(np.searchsorted(self._starts, index, "right")) - 1
        place = f"{self._files[shard]}, record {index - self._starts[shard]}"
        try:
            origin = os.path.join(self._origin, str(self._single[int(index)][1]))
        except RuntimeError:  # what a shard damaged beyond reading raises
            return place
        return f"{origin} (in {place})"

    def image_dataset(self, indices: np.ndarray, workers: int) -> ds.Dataset:
        """MindSpore's own reader: its threads read in parallel and keep the order of `indices`."""
        sampler = ds.SubsetSampler(np.asarray(indices).tolist())
        readers = _readers(len(self._files), workers)
        dataset = ds.MindDataset(
            self._files, ["image"], num_parallel_workers=readers, sampler=sampler
        )
        if self._unready:
            dataset = dataset.map(prepare, ["image"], num_parallel_workers=workers)
        return dataset

    def digest_items(self, indices: np.ndarray, number: int, by_name: bool = False) -> int:
        """The shards' checksums stand for the items: their names would have to be read."""
        if by_name:
            return super().digest_items(indices, number)
        number = zlib.crc32(np.ascontiguousarray(indices, np.int64), number)
        return zlib.crc32("".join(self._checksums).encode(), number)


def open_records(
    root: Path,
    split: str,
    title: str,
    class_names: Sequence[str] | None = None,
    *,
    train_folder: str = "train",
    val_folder: str = "val",
) -> RecordSource:
    """Open one split that tools.records has written, after a quick look at every shard.

    Args:
        root: the folder of the splits' folders.
        split, class_names, train_folder, val_folder: as in `open_source`; like "imagefolder" it
            numbers the classes by the names given.

    Raises:
        UserError: a shard is missing, of another size or of another set; a class of the images is
            none of `class_names`; the system allows too few open files.
    """
    folder = root / (train_folder if split == "train" else val_folder)
    index = read_index(folder)
    for shard in index["shards"]:
        check_shard(folder, shard)
    names = tuple(index["class_names"] if class_names is None else class_names)
    new_label = {canonical(name): label for label, name in enumerate(names)}
    runs = np.array([run for shard in index["shards"] for run in shard["labels"]])  # label, images
    present = [index["class_names"][label] for label in sorted(set(runs[:, 0].tolist()))]
    strange = [name for name in present if canonical(name) not in new_label]
    if strange:
        raise UserError(
            f"{folder}: {some_names(strange, 5)}: none of the {len(names)} known classes "
            f"({some_names(names, 5)}); use the data set that the model was trained for"
        )
    table = np.array([new_label.get(canonical(name), -1) for name in index["class_names"]])
    labels = np.repeat(table[runs[:, 0]], runs[:, 1])
    _readers(len(index["shards"]), 1)
    return RecordSource(folder, index, labels, names, title)


def _readers(shards: int, wanted: int) -> int:
    """How many threads may read at once: MindSpore opens every shard in each, and once more.

    Raises this process's limit of open files to what that takes, as far as the system lets it; half
    of it is for a second pipeline, as evaluation within training.

    Raises:
        UserError: not even one.
    """
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
    """The index of a finished split.

    Raises:
        UserError: there is none, or it is not one.
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
    """An index file, finished or not, checked for what readers rely on.

    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, classes, images = index["format"], len(index["class_names"]), 0
        for shard in index["shards"]:
            counts = [count for label, count in shard["labels"] if 0 <= label < classes]
            if sum(counts) != shard["images"] or len(counts) != len(shard["labels"]):
                raise ValueError(f"labels and images of {shard['name']} disagree")
            images += shard["images"]
            for key in (
                "bytes",
                "sha256",
                "index_bytes",
                "index_sha256",
                "head",
                "origin",
                "skipped",
            ):
                shard[key]
        if path.name == INDEX and (images != index["images"] or not images):
            raise ValueError(f"{images} images in the shards, {index['images']} in all")
        for key in ("source", "listing", "images_per_shard", "skip_broken"):
            index[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged or no index of ours ({error!r}); copy it again, or remove it "
            "and convert again"
        ) from error
    if version != FORMAT:
        raise UserError(f"{path}: format {version}, this version reads {FORMAT}; convert again")
    return index


def verify(root: Path) -> dict[Path, int]:
    """Read every shard of every split at `root` or below it against its checksum.

    Returns:
        Images by the split's folder.

    Raises:
        UserError: no split there, an unfinished one, or a shard that is not what it was.
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
    return images
