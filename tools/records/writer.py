"""From an image folder to MindRecord shards, in steps that an interruption cannot spoil."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mindspore.dataset as ds
from mindspore.mindrecord.common.exceptions import MindRecordException

from src.data.base import Source
from src.data.images import find_fault, is_decodable
from src.data.records import FORMAT, INDEX, UNFINISHED, load_index
from src.data.shards import open_writer, seal, verify_shard
from src.data.sources import open_source
from src.errors import UserError
from src.files import remove_unfinished, write_json
from src.progress import progress_bar

_log = logging.getLogger("cvt")

_T = TypeVar("_T")
_ASIDE = ".writing"
_BATCH = 64  # records handed to MindSpore at once
_CHANGED = {
    "listing": "the list of images in {} is",
    "class_names": "the list of classes in {} is",
    "images_per_shard": "--images_per_shard is",
    "skip_broken": "--skip_broken is",
}


@dataclass(frozen=True)
class Options:
    """How to convert.

    Args:
        images_per_shard: images of the folder in a shard; a training opens all shards at once.
        workers: threads that read and check images.
        skip_broken: leave out images that cannot be read instead of refusing.
        force: go on where the folder or these options changed; shards that still fit are kept.
    """

    images_per_shard: int = 50_000
    workers: int = 0
    skip_broken: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.images_per_shard < 1 or self.workers < 0:
            raise UserError("--images_per_shard must be 1 or more, --workers 0 or more")


@dataclass
class Converted:
    """What a split became: images in the shards, shards kept from before, files left out."""

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
    """Convert the splits of an image folder, those of the two folders that are there.

    Killed at any moment and started again, it ends with the same files as without: a shard is
    written aside, moved into place whole and then noted; one that is noted is kept if its checksums
    and its source files (names, sizes, times) are still the same.

    Returns:
        What each split became, by the name of its folder.

    Raises:
        UserError: the folder is not what "imagefolder" takes, an image can't be read, the target
            can't be written or holds shards of other images.
    """
    if not root.is_dir():
        raise UserError(f"--src {root}: no such folder; give the image folder")
    folders = {"train_folder": train_folder, "val_folder": val_folder}
    there = [s for s in ("train", "val") if (root / folders[f"{s}_folder"]).is_dir()]
    if target.resolve() == root.resolve():
        raise UserError(f"--dst {target}: is the image folder itself; give another folder")
    root = Path(os.path.abspath(root))
    sources = {  # all opened before the first is converted, so that their faults come early
        folders[f"{split}_folder"]: open_source("imagefolder", str(root), split, **folders)
        for split in there or ["train"]
    }
    missing = [folders[f"{s}_folder"] for s in ("train", "val") if s not in there]
    if missing:
        _log.warning("%s: no folder %s, going on without it", root, missing[0])
    return {
        name: _Conversion(source, root, target / name, options).run()
        for name, source in sources.items()
    }


class _Conversion:
    """One split on its way into its folder."""

    def __init__(self, source: Source, root: Path, folder: Path, options: Options) -> None:
        self._source = source
        self._root = root
        self._folder = folder
        self._options = options
        self._workers = options.workers or min(os.cpu_count() or 1, 16)
        self._index = {
            "format": FORMAT,
            "source": str(root),
            "class_names": list(source.class_names),
            "listing": self._listing(),
            "images_per_shard": options.images_per_shard,
            "skip_broken": options.skip_broken,
            "images": 0,
            "shards": [],
        }

    def run(self) -> Converted:
        """Keep what is there, write the rest, close with the index."""
        earlier, bounds = self._earlier(), self._bounds()
        index, unfinished = self._folder / INDEX, self._folder / UNFINISHED
        if index.is_file() and len(earlier) == len(bounds):
            return self._close(list(earlier.values()), len(earlier))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if index.is_file():
                os.replace(index, unfinished)  # for readers too, from here on
        except OSError as error:
            raise UserError(f"{self._folder}: {error.strerror}; give another --dst") from error
        # Before the first shard, so that no shard of ours is ever without an index.
        write_json({**self._index, "shards": list(earlier.values())}, unfinished)
        shards = self._index["shards"]
        with ThreadPoolExecutor(self._workers) as pool, self._bar("convert") as bar:
            for number, (first, last) in enumerate(bounds):
                if number in earlier:
                    shards.append(earlier[number])
                    bar.update(last - first)
                    continue
                shards.append(self._write(number, first, last, pool, bar.update))
                # Later shards of the earlier start are noted on, lest a second kill loses them.
                later = [shard for key, shard in earlier.items() if key > number]
                write_json({**self._index, "shards": shards + later}, unfinished)
        self._index["images"] = sum(shard["images"] for shard in shards)
        write_json(self._index, index)
        return self._close(shards, len(earlier))

    def _close(self, shards: list[dict[str, Any]], kept: int) -> Converted:
        self._tidy({shard["name"] for shard in shards})
        skipped = [name for shard in shards for name in shard["skipped"]]
        return Converted(sum(shard["images"] for shard in shards), len(shards), kept, skipped)

    def _tidy(self, names: set[str]) -> None:
        """Take away what an interruption, or another number of shards, has left behind."""
        (self._folder / UNFINISHED).unlink(missing_ok=True)
        shutil.rmtree(self._folder / _ASIDE, ignore_errors=True)
        remove_unfinished(self._folder)
        for path in self._folder.glob("[0-9]" * 5 + ".mindrecord*"):
            if path.name not in names and path.name.replace(".db", "") not in names:
                path.unlink()

    def _bar(self, doing: str):
        return progress_bar(len(self._source), f"{doing} {self._folder.name}")

    def _bounds(self) -> list[tuple[int, int]]:
        step, count = self._options.images_per_shard, len(self._source)
        return [(first, min(first + step, count)) for first in range(0, count, step)]

    def _name(self, position: int) -> str:
        """An image's path below the source folder; bytes that are no UTF-8 as escapes."""
        path = self._source.describe(position)[len(os.path.join(self._root, "")) :]
        return os.fsencode(path).decode("utf-8", "backslashreplace")

    def _listing(self) -> str:
        """SHA-256 of the images' names and labels."""
        digest = hashlib.sha256()
        for position, label in enumerate(self._source.labels.tolist()):
            digest.update(f"{self._name(position)}\0{label}\n".encode())
        return digest.hexdigest()

    def _look_at(self, first: int, last: int) -> tuple[list[int], str, str]:
        """Some images' sizes in bytes, a digest of names, labels and sizes, and one with times.

        The first digest marks the shard as this set's, the second notices a file that has changed.
        """
        sizes, marks = [], hashlib.sha256()
        times = hashlib.sha256()
        for position in range(first, last):
            stat = _of_file(os.stat, self._source.describe(position))
            sizes.append(stat.st_size)
            line = f"{self._name(position)}\0{self._source.labels[position]} {stat.st_size}\n"
            marks.update(line.encode())
            times.update(f"{stat.st_mtime_ns}\n".encode())
        times.update(marks.digest())
        return sizes, marks.hexdigest(), times.hexdigest()

    def _earlier(self) -> dict[int, dict[str, Any]]:
        """The shards of an earlier start that are good, by number.

        Raises:
            UserError: the images or the options are not what they were.
        """
        paths = [self._folder / name for name in (INDEX, UNFINISHED)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            strange = sorted(path.name for path in self._folder.glob("*.mindrecord*"))
            if strange and not self._options.force:
                raise UserError(
                    f"{self._folder}: {strange[0]} there is not of this command and would be "
                    "replaced; give another --dst, or add --force"
                )
            return {}
        before = load_index(path)
        for key in ("class_names", "listing", "images_per_shard", "skip_broken"):
            if before[key] != self._index[key]:
                self._check_forced(_CHANGED[key].format(self._root))
        bounds, good = self._bounds(), {}
        with self._bar("verify") as bar:
            for shard in before["shards"]:
                number = int(Path(shard["name"]).stem)
                if number >= len(bounds) or before["class_names"] != self._index["class_names"]:
                    continue
                if shard["skipped"] and not self._options.skip_broken:
                    continue
                if self._look_at(*bounds[number])[2] != shard["origin"]:
                    self._check_forced(f"an image file of shard {number} in {self._root} is")
                    continue
                try:
                    verify_shard(self._folder, shard)
                    good[number] = shard
                except UserError as error:
                    _log.warning("written anew: %s", error)
                bar.update(bounds[number][1] - bounds[number][0])
        return good

    def _check_forced(self, what: str) -> None:
        if not self._options.force:
            raise UserError(
                f"{self._folder}: {what} not what it was when the conversion began; add --force to "
                "write anew the shards that no longer fit, or give another --dst"
            )

    def _write(
        self,
        number: int,
        first: int,
        last: int,
        pool: ThreadPoolExecutor,
        advance: Callable[[int], Any],
    ) -> dict[str, Any]:
        """Write one shard; its entry in the index."""
        aside = self._folder / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        path = aside / f"{number:05d}.mindrecord"
        sizes, mark, origin = self._look_at(first, last)
        labels, skipped, unready = [], [], []
        try:
            writer = open_writer(path, sizes, mark)
            for batch in self._records(first, last, sizes, pool, skipped, unready):
                labels += [record["label"] for record in batch]
                writer.write_raw_data(batch)
                advance(len(batch))
            advance(len(skipped))
            if not labels:
                raise UserError(f"{self._name(first)} and the {last - first - 1} images behind it: "
                                "not one is readable; is this the right --src?")  # fmt: skip
            writer.commit()
            # MindSpore leaves out a record that it finds at fault, with no more than a warning.
            if ds.MindDataset([str(path)]).get_dataset_size() != len(labels):
                raise RuntimeError("MindSpore has not written every record")
            entry = seal(path, self._folder)
        except (OSError, RuntimeError, MindRecordException) as error:
            text = " ".join(str(error).split())[:300]
            raise UserError(f"{self._folder}: cannot write {path.name}: {text}") from error
        runs = [[label, len(list(group))] for label, group in itertools.groupby(labels)]
        content = {"images": len(labels), "labels": runs, "skipped": skipped, "origin": origin}
        content["unready"] = len(unready)
        return {"name": path.name, **content, **entry}

    def _records(
        self,
        first: int,
        last: int,
        sizes: list[int],
        pool: ThreadPoolExecutor,
        skipped: list[str],
        unready: list[str],
    ) -> Iterator[list[dict[str, Any]]]:
        """Records of the readable images in batches; names of the others go into `skipped`.

        Names of those that MindSpore reads right only after `make_decodable` go into `unready`.
        """
        paths = [self._source.describe(position) for position in range(first, last)]
        batch = []
        for offset, read in enumerate(_ahead(pool, _read, paths, 4 * self._workers)):
            position = first + offset
            if read is None:
                if not self._options.skip_broken:
                    self._refuse(position, pool)
                skipped.append(self._name(position))
                continue
            content, ready = read
            unready += [self._name(position)] * (not ready)
            if len(content) != sizes[offset]:
                raise UserError(f"{paths[offset]}: changes while it is read; start again later")
            label = int(self._source.labels[position])
            batch.append({"image": content, "file": self._name(position), "label": label})
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _refuse(self, position: int, pool: ThreadPoolExecutor) -> NoReturn:
        """Look through the rest, so that one start finds all that is broken."""
        paths = [self._source.describe(p) for p in range(position, len(self._source))]
        contents = _ahead(pool, _read, paths, 4 * self._workers)
        broken = [path for path, content in zip(paths, contents) if content is None]
        for path in broken[1:]:
            _log.warning("%s: not a readable image", path)
        more = _and_more(len(broken) - 1)
        remedy = "replace what is broken, or leave it out with --skip_broken"
        raise UserError(f"{broken[0]}: not a readable image{more}; {remedy}")


def _and_more(count: int) -> str:
    return f", nor are {count} more, named above" if count else ""


def _of_file(function: Callable[[str], _T], path: str) -> _T:
    try:
        return function(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is the image folder still there?") from error


def _read(path: str) -> tuple[bytes, bool] | None:
    """An image file's bytes, and whether MindSpore decodes them right; None if they are no image.

    A record holds the file unchanged: the bitmap that `make_decodable` makes of a photograph that
    EXIF turns is ten times as large.
    """
    content = _of_file(lambda name: Path(name).read_bytes(), path)
    fault, _ = find_fault(content)
    return None if fault else (content, is_decodable(content))


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[str], _T], items: Iterable[str], window: int
) -> Iterator[_T]:
    """`map(function, items)` by the pool's threads, at most `window` results waiting in memory."""
    waiting: deque = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
