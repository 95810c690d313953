"""Packs an image folder into MindRecord shards; an interrupted conversion can be continued."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mindspore.dataset as ds
from mindspore.mindrecord.common.exceptions import MindRecordException
from tqdm import tqdm

from src.cores import cpu_count
from src.data.base import Source
from src.data.images import find_fault, is_decodable
from src.data.records import FORMAT, INDEX, UNFINISHED, load_index
from src.data.shards import (
    choose_layout,
    commit_shard,
    open_writer,
    require_readable,
    require_utf8,
    verify_shard,
)
from src.data.sources import open_source
from src.errors import UserError
from src.files import remove_unfinished, write_json
from src.folder_lock import lock_folder
from src.progress import progress_bar

_log = logging.getLogger("cvt")

_T = TypeVar("_T")
_PARTIAL = ".writing"
_BATCH = 64  # records handed to MindSpore at once
_CHANGED = {
    "class_names": "the list of classes in {} has",
    "listing": "the list of images in {} has",
    "images_per_shard": "--images_per_shard has",
    "skip_broken": "--skip_broken has",
}


@dataclass(frozen=True)
class Options:
    """Options of a conversion.

    Args:
        images_per_shard: source images per shard; training opens all shards at once.
        workers: threads that read and check images; 0 chooses by the cores.
        skip_broken: skip unreadable images instead of failing.
        force: continue although the folder or these options have changed; matching shards are kept.
    """

    images_per_shard: int = 50_000
    workers: int = 0
    skip_broken: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.images_per_shard < 1:
            raise UserError(f"--images_per_shard {self.images_per_shard}: must be 1 or more")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be 0 or more")


@dataclass
class Converted:
    """Result for one split: images and shards, shards kept from an earlier start, skipped files."""

    images: int
    shards: int
    kept: int
    skipped: list[str] = field(default_factory=list)


def convert(
    root: Path,
    target: Path,
    options: Options,
    *,
    train_folder: str = "train",
    val_folder: str = "val",
) -> dict[str, Converted]:
    """Convert the splits of an image folder that exist.

    If it is killed at any moment and started again, the result is the same, byte for byte: a shard
    is written to a temporary folder, moved into place and then recorded. A recorded shard is kept
    if its checksums and its source files (names, sizes, times) have not changed.

    Returns:
        The result for each split, by the name of its folder.

    Raises:
        UserError: "imagefolder" rejects the folder, an image cannot be read, the target cannot be
            written or contains shards of other images.
    """
    if not root.is_dir():
        raise UserError(f"--src {root}: no such folder; give the image folder")
    folders = {"train_folder": train_folder, "val_folder": val_folder}
    found = [s for s in ("train", "val") if (root / folders[f"{s}_folder"]).is_dir()]
    if target.resolve() == root.resolve():
        raise UserError(f"--dst {target}: is the image folder itself; give another folder")
    for key, name in folders.items():
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise UserError(
                f"--{key} {name}: must be below --src, as its shards will be below --dst; give a "
                "relative path without .."
            )
        require_utf8(target / name)
    _require_outside(root, target, folders)
    root = Path(os.path.abspath(root))
    try:
        sources = {  # open all before converting the first, so that their errors come early
            folders[f"{split}_folder"]: open_source("imagefolder", str(root), split, **folders)
            for split in found or ["train"]
        }
    except UserError as error:  # in the words of train.py's options
        text = re.sub(
            r"(, or hold out training images with)? ?--data\.val_from_train N", "", str(error)
        )
        raise UserError(re.sub(r"(--)?data\.(?=(train|val)_folder)", "--", text)) from None
    missing = [folders[f"{s}_folder"] for s in ("train", "val") if s not in found]
    if missing:
        _log.warning("%s: no folder %s, skipping this split", root, missing[0])
    with lock_folder(target, "--dst"):
        return {
            name: _Conversion(source, root, target / name, options).run()
            for name, source in sources.items()
        }


def _require_outside(root: Path, target: Path, folders: dict[str, str]) -> None:
    """Refuse to write shards into a split, where the next start would find them as a class.

    Raises:
        UserError: a folder to write is a split's folder, or inside it.
    """
    for split in (root / name for name in folders.values()):
        for place in (target, *(target / name for name in folders.values())):
            if split.is_dir() and split.resolve() in (place.resolve(), *place.resolve().parents):
                raise UserError(
                    f"--dst {target}: {place} is inside the image folder {split}; give a folder "
                    "outside"
                )


class _Conversion:
    """Converts one split."""

    def __init__(self, source: Source, root: Path, folder: Path, options: Options) -> None:
        self._source = source
        self._root = root
        self._folder = folder
        self._options = options
        self._workers = options.workers or min(cpu_count(), 16)
        step, count = options.images_per_shard, len(source)
        self._ranges = [range(i, min(i + step, count)) for i in range(0, count, step)]
        self._head = {
            "format": FORMAT,
            "source": str(root),
            "class_names": list(source.class_names),
            "listing": self._listing(),
            "images_per_shard": options.images_per_shard,
            "skip_broken": options.skip_broken,
        }

    def run(self) -> Converted:
        """Keep the intact shards of an earlier start, write the others, finish with the index."""
        shards = self._intact_shards()
        kept = len(_written(shards))
        if len(shards) < len(self._ranges) or not self._is_indexed(shards):
            self._write_missing(shards)
        written = _written(shards)
        self._remove_leftovers({shard["name"] for shard in written})
        skipped = [name for number in sorted(shards) for name in shards[number]["skipped"]]
        images = sum(shard["images"] for shard in written)
        return Converted(images, len(written), kept, skipped)

    def _write_missing(self, shards: dict[int, dict[str, Any]]) -> None:
        """Write the shards that are missing in `shards`, add them, and write the index.

        Raises:
            UserError: a file can't be read or written, or MindSpore can't read the shards.
        """
        index, unfinished = self._folder / INDEX, self._folder / UNFINISHED
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if index.is_file():
                os.replace(index, unfinished)  # from now on readers reject the folder
        except OSError as error:
            raise UserError(f"{self._folder}: {error.strerror}; give another --dst") from error
        write_json(self._index(shards), unfinished)  # before the first shard: the folder is ours
        bar = progress_bar(len(self._source), f"convert {self._folder.name}")
        with ThreadPoolExecutor(self._workers) as pool, bar:
            for number, positions in enumerate(self._ranges):
                if number in shards:
                    bar.update(len(positions))
                else:
                    shards[number] = self._write_shard(number, positions, pool, bar)
                    write_json(self._index(shards), unfinished)
        written = _written(shards)
        if not written:
            raise UserError(f"{self._folder}: no image is readable; is this the right --src?")
        require_readable(self._folder, [shard["name"] for shard in written])
        write_json(self._index(shards), index)

    def _index(self, shards: dict[int, dict[str, Any]]) -> dict[str, Any]:
        written = _written(shards)
        index = {**self._head, "images": sum(shard["images"] for shard in written)}
        empty = [shards[number] for number in sorted(shards) if not shards[number]["images"]]
        return {**index, "shards": written, **({"empty": empty} if empty else {})}

    def _is_indexed(self, shards: dict[int, dict[str, Any]]) -> bool:
        """Return whether the index describes these shards and no others."""
        file = self._folder / INDEX
        return file.is_file() and load_index(file) == self._index(shards)

    def _remove_leftovers(self, names: set[str]) -> None:
        """Remove what an interruption, or another number of shards, has left behind."""
        (self._folder / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(self._folder / _PARTIAL, ignore_errors=True)
        remove_unfinished(self._folder)
        for path in self._folder.glob("[0-9]" * 5 + ".mindrecord*"):
            if path.name not in names and path.name.replace(".db", "") not in names:
                path.unlink()

    def _name(self, position: int) -> str:
        """Return an image's path below the source folder, with bytes that are not UTF-8 escaped."""
        path = self._source.describe(position)[len(os.path.join(self._root, "")) :]
        return os.fsencode(path).decode("utf-8", "backslashreplace")

    def _listing(self) -> str:
        """Return the SHA-256 of the images' names and labels."""
        digest = hashlib.sha256()
        for position, label in enumerate(self._source.labels.tolist()):
            digest.update(f"{self._name(position)}\0{label}\n".encode())
        return digest.hexdigest()

    def _fingerprint(self, positions: range) -> tuple[list[int], str, str]:
        """Return the files' sizes, a digest of names, labels and sizes, and one with times too.

        The first digest, in the shard's header, identifies the data set; the second one detects a
        source file that has changed.
        """
        sizes, content, times = [], hashlib.sha256(), hashlib.sha256()
        for position in positions:
            stat = _access(os.stat, self._source.describe(position))
            size, time = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
            sizes.append(size)
            line = f"{self._name(position)}\0{self._source.labels[position]} {size}\n"
            content.update(line.encode())
            times.update(f"{time}\n".encode())
        times.update(content.digest())
        return sizes, content.hexdigest(), times.hexdigest()

    @functools.cached_property
    def _layout(self) -> list[int]:
        """The layout of every shard; it follows from the source, so a new start finds the same."""
        sizes = [self._fingerprint(positions)[0] for positions in self._ranges]
        try:
            return choose_layout(max(map(max, sizes)), max(map(sum, sizes)))
        except UserError as error:
            raise UserError(f"{self._folder}: {error}") from None

    def _intact_shards(self) -> dict[int, dict[str, Any]]:
        """Return the shards of an earlier start that are intact and match the source, by number.

        Raises:
            UserError: the images or the options have changed.
        """
        paths = [self._folder / name for name in (INDEX, UNFINISHED)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            foreign = sorted(path.name for path in self._folder.glob("*.mindrecord*"))
            if foreign and not self._options.force:
                raise UserError(
                    f"{self._folder}: {foreign[0]} was not written by this command and would be "
                    "replaced; give another --dst, or add --force"
                )
            return {}
        earlier = load_index(path)
        shards = earlier["shards"] + earlier.get("empty", [])
        if not shards:
            return {}
        for key, what in _CHANGED.items():
            # Shards that were written without --skip_broken have no broken image to skip.
            told = key == "skip_broken" and self._options.skip_broken
            if earlier[key] != self._head[key] and not told:
                self._require_force(what.format(self._root))
        if earlier["class_names"] != self._head["class_names"]:
            return {}
        intact = {}
        with progress_bar(len(self._source), f"verify {self._folder.name}") as bar:
            for shard in shards:
                number = int(Path(shard["name"]).stem)
                if number >= len(self._ranges):
                    continue
                if shard["skipped"] and not self._options.skip_broken:
                    continue
                if self._fingerprint(self._ranges[number])[2] != shard["origin"]:
                    self._require_force(f"an image file of shard {number} in {self._root} has")
                    continue
                if not shard["images"]:
                    intact[number] = shard
                    continue
                try:
                    verify_shard(self._folder, shard)
                    alone = self._layout if len(self._ranges) == 1 else None  # of any layout
                    if shard.get("layout", alone) == self._layout:
                        intact[number] = shard
                    else:
                        _log.warning("rewriting %s: its pages have another size", shard["name"])
                except UserError as error:
                    _log.warning("rewriting a shard: %s", error)
                bar.update(len(self._ranges[number]))
        return intact

    def _require_force(self, what: str) -> None:
        if not self._options.force:
            raise UserError(
                f"{self._folder}: {what} changed since the conversion began; add --force to "
                "rewrite the shards that no longer match, or give another --dst"
            )

    def _write_shard(
        self, number: int, positions: range, pool: ThreadPoolExecutor, bar: tqdm
    ) -> dict[str, Any]:
        """Write one shard, unless all its images are skipped; returns its entry in the index."""
        folder = self._folder / _PARTIAL
        path = folder / f"{number:05d}.mindrecord"
        sizes, content_digest, origin = self._fingerprint(positions)
        layout = self._layout
        files = [self._source.describe(position) for position in positions]
        labels, skipped, unready, batch = [], [], 0, []
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            writer = open_writer(path, layout, content_digest)
            reads = _map_ahead(pool, _read, files, 4 * self._workers)
            for position, file, size, read in zip(positions, files, sizes, reads):
                bar.update()
                if read is None:
                    if not self._options.skip_broken:
                        self._raise_broken(position, pool)
                    skipped.append(self._name(position))
                    continue
                content, ready = read
                if len(content) != size:
                    raise UserError(f"{file}: changed while it was read; start again later")
                unready += not ready
                labels.append(int(self._source.labels[position]))
                name = self._name(position)
                batch.append({"image": content, "file": name, "label": labels[-1]})
                if len(batch) == _BATCH:
                    writer.write_raw_data(batch)
                    batch = []
            if not labels:
                _log.warning(
                    "%s to %s: no image is readable, so there is no %s",
                    self._name(positions[0]), self._name(positions[-1]), path.name,
                )  # fmt: skip
                return {"name": path.name, "images": 0, "skipped": skipped, "origin": origin}
            if batch:
                writer.write_raw_data(batch)
            writer.commit()
            # MindSpore drops a record that it finds invalid with only a warning.
            if ds.MindDataset([str(path)]).get_dataset_size() != len(labels):
                raise RuntimeError("MindSpore has not written every record")
            entry = commit_shard(path, self._folder)
        except (OSError, RuntimeError, MindRecordException) as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"{self._folder}: cannot write {path.name}: {text}") from error
        return {
            "name": path.name,
            "images": len(labels),
            "labels": [[label, len(list(group))] for label, group in itertools.groupby(labels)],
            "skipped": skipped,
            "origin": origin,
            "unready": unready,
            "layout": layout,
            **entry,
        }

    def _raise_broken(self, position: int, pool: ThreadPoolExecutor) -> NoReturn:
        """Check the remaining images too, so that one start finds all broken ones."""
        files = [self._source.describe(p) for p in range(position, len(self._source))]
        reads = _map_ahead(pool, _read, files, 4 * self._workers)
        broken = [file for file, read in zip(files, reads) if read is None]
        for file in broken[1:]:
            _log.warning("%s: not a readable image", file)
        more = f" ({len(broken) - 1} more are named above)" if len(broken) > 1 else ""
        raise UserError(
            f"{broken[0]}: not a readable image{more}; replace broken images, or skip them with "
            "--skip_broken"
        )


def _written(shards: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the shards that have images, in order; MindRecord has no empty ones."""
    return [shards[number] for number in sorted(shards) if shards[number]["images"]]


def _access(function: Callable[[str], _T], path: str) -> _T | None:
    """Call a function of a file; None if the file is a dangling link or must not be read."""
    try:
        return function(path)
    except OSError as error:
        own_fault = isinstance(error, (FileNotFoundError, PermissionError))
        if own_fault and Path(path).parent.is_dir():
            return None
        raise UserError(f"{path}: {error.strerror}; is the image folder still there?") from error


def _read(path: str) -> tuple[bytes, bool] | None:
    """Read an image file.

    Returns:
        Its bytes, and whether MindSpore decodes them correctly without `make_decodable`; None if it
        is not an image. Records hold the file unchanged: the bitmap that `make_decodable` makes of
        a photograph with EXIF rotation is ten times as large.
    """
    content = _access(lambda name: Path(name).read_bytes(), path)
    if content is None or find_fault(content)[0]:
        return None
    return content, is_decodable(content)


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[str], _T], items: Iterable[str], limit: int
) -> Iterator[_T]:
    """Like `pool.map(function, items)`, with at most `limit` results waiting in memory."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
