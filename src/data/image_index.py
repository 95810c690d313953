"""Check every image file of a data set once, and keep the results in an index.

The index is JSON: the size, modification time and fault of each file. Only files that are new,
changed or were broken are read again.

The ranks of a job share the files and exchange results every `_ROUND_SECONDS`, because collectives
time out (HCCL: 120 s for the first, half an hour for others). So a rank waits for the others at
most that long, plus the time for `_BATCH` files or for the first rank to read or write the index.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from src.cores import cpu_count
from src.data.images import find_fault
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError
from src.files import require_writable, write_text
from src.json_reader import read_json

logger = logging.getLogger("cvt")

_VERSION = 2  # of the file format and of `find_fault`
# A killed process loses at most this much work. ImageNet's index takes 6 s to write.
_SAVE_SECONDS = 120.0
_HEAD = re.compile(rb'\{"sha256": "[0-9a-f]{64}", "content": \{')
# Of an index that is only read, because it may come from elsewhere with a checkpoint. ImageNet's
# takes about 107 MB, ImageNet-22k's 1.2 GB.
_MAX_BYTES = 1 << 30
_MAX_THREADS = 32
_ROUND_SECONDS = 20.0
_BATCH = 128  # files between two checks of the time


class IndexEntry(NamedTuple):
    """What the index holds for a file.

    Args:
        size: in bytes; -1 for a missing file.
        mtime_ns: modification time.
        fault: what is wrong with it; "" if nothing.
        turned: whether EXIF turns it.
    """

    size: int
    mtime_ns: int
    fault: str
    turned: bool


def check_files(
    files: Sequence[str],
    root: str | Path,
    index: Path | None = None,
    *,
    write: bool = True,
    workers: int = 0,
    progress: Callable[[int, str], tqdm] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> list[IndexEntry]:
    """Check image files; read only those that the index does not know.

    Args:
        files: image files below `root`, the same on every rank.
        root: the data set's folder, to which the index belongs.
        index: the index file; it need not exist. None uses no index.
        write: write the index, every two minutes and at the end. The file must be missing or an
            earlier index.
        workers: threads (Pillow decodes outside Python's lock); 0 means one per core.
        progress: creates a progress bar from the number of files and a title.
        ranks: the ranks that share the work. Only the first reads and writes the index; the others
            learn the result for each file from it.

    Raises:
        UserError: the index can't be written, or was not written by this program.
    """
    keep = index is not None and write and ranks.is_first
    if keep:
        _check_replaceable(index)
    entries = _read(index, root, own=keep) if index is not None and ranks.is_first else {}
    names = [os.path.relpath(file, root) for file in files]
    stats = dict(
        _map_over_ranks(range(len(files)), lambda some: [_stat(files[k]) for k in some], ranks)
    )
    stale, removed = _drop_outdated(entries, names, stats, index, root)
    stale = ranks.broadcast_indices(stale, len(files))
    turned = [k for k, name in enumerate(names) if name in entries and entries[name].turned]
    for k in ranks.broadcast_indices(turned, len(files)):
        entries.setdefault(names[k], IndexEntry(*stats[k], "", True))
    threads = min(workers or cpu_count(), _MAX_THREADS)
    if ranks.is_first:
        logger.info(
            "%s: checking %d of %d images (threads: %d%s)", root, len(stale), len(files), threads,
            f" on each of {ranks.world} ranks" if ranks.world > 1 else "",
        )  # fmt: skip
    bar = progress(len(stale), "check images") if progress is not None and ranks.is_first else None
    saved = time.monotonic()
    try:
        # Pillow warns of odd EXIF and large images; what matters of that is in the fault.
        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            warnings.simplefilter("ignore")
            results = _map_over_ranks(
                stale, lambda some: list(pool.map(_check_file, [files[k] for k in some])), ranks
            )
            for k, (fault, turned) in results:
                entries[names[k]] = IndexEntry(*stats[k], fault, turned)
                if bar is not None:
                    bar.update(1)
                if keep and time.monotonic() - saved > _SAVE_SECONDS:
                    _write(index, root, entries)
                    saved = time.monotonic()
    finally:  # keep the results of an interrupted check
        if keep and (stale or removed):
            _write(index, root, entries)
    if bar is not None:
        bar.close()
    return [entries.get(name) or IndexEntry(*stats[k], "", False) for k, name in enumerate(names)]


def _drop_outdated(
    entries: dict[str, IndexEntry],
    names: Sequence[str],
    stats: dict[int, tuple[int, int]],
    index: Path | None,
    root: str | Path,
) -> tuple[list[int], list[str]]:
    """Drop the entries of changed and removed files.

    Returns:
        The files to read, and the names of those removed.
    """
    changed = [n for k, n in enumerate(names) if n in entries and entries[n][:2] != stats[k]]
    removed = _find_removed(entries, names, root)
    for what, some in (("changed", changed), ("removed", removed)):
        if some:
            logger.info(
                "%s: files %s since the last check (%d), such as %s",
                index, what, len(some), some[0],
            )  # fmt: skip
    for name in removed + changed:
        del entries[name]
    return [k for k, n in enumerate(names) if n not in entries or entries[n].fault], removed


def _find_removed(
    entries: dict[str, IndexEntry], names: Sequence[str], root: str | Path
) -> list[str]:
    """Return the names of removed files.

    The folders of the split are listed, which is faster than a stat of each file. In other folders,
    which the check of their own split lists, files count as removed only if the folder is.
    """
    present, others = set(names), {}
    for name in entries:
        if name not in present:
            others.setdefault(os.path.dirname(name), []).append(name)
    top = os.path.commonpath({os.path.dirname(name) for name in names}) if names and others else ""
    removed = []
    for folder, some in others.items():
        place = os.path.join(root, folder)
        if not os.path.isdir(place):
            removed += some
        elif os.path.commonpath([top, folder]) == top:
            found = set(os.listdir(place))
            removed += [name for name in some if os.path.basename(name) not in found]
    return removed


def _map_over_ranks(
    todo: Sequence[int], work: Callable[[Sequence[int]], Sequence[tuple]], ranks: Ranks
) -> Iterator[tuple[int, tuple]]:
    """Do `work` for all numbers, shared by the ranks; yield (number, result) on every rank.

    Each exchange distributes the remaining numbers again, so that a slow rank gets fewer.
    """
    if ranks.world == 1:
        for start in range(0, len(todo), _BATCH):
            some = todo[start : start + _BATCH]
            yield from zip(some, work(some))
        return
    todo = list(todo)
    while todo:
        own, done = todo[ranks.rank :: ranks.world], []
        end = time.monotonic() + _ROUND_SECONDS
        while len(done) < len(own) and (not done or time.monotonic() < end):
            done += work(own[len(done) : len(done) + _BATCH])
        gathered = [json.loads(text) for text in ranks.gather_texts(json.dumps(done))]
        finished = set()
        for rank, results in enumerate(gathered):
            for k, result in zip(todo[rank :: ranks.world], results):
                finished.add(k)
                yield k, tuple(result)
        todo = [k for k in todo if k not in finished]


def _check_file(file: str) -> tuple[str, bool]:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return f"can't be read ({error.strerror})", False
    return find_fault(content)


def _stat(file: str | Path) -> tuple[int, int]:
    """Return a file's size and modification time; (-1, 0) if it does not exist."""
    try:
        status = os.stat(file)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _read(index: Path, root: str | Path, own: bool) -> dict[str, IndexEntry]:
    """Read the entries by file name; log why and return none if the index is not valid.

    Args:
        index: the file.
        root: the data set's folder.
        own: read an index of any size, because this run writes it.
    """
    try:
        stored = read_json(index, index.stat().st_size if own else _MAX_BYTES)
        content = stored["content"]
        if stored["sha256"] != _checksum(content):
            raise ValueError("wrong checksum")
        if content["version"] != _VERSION:
            raise ValueError("written by another version of this program")
        if content["root"] != _hash_path(root):
            raise ValueError("written for another folder")
        return {name: IndexEntry(*entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s: image index ignored, all images are read (%s)", index, error)
        return {}


def _check_replaceable(index: Path) -> None:
    """Refuse to replace a file that is not an index, before any image is read."""
    require_writable(index, "data.index")
    try:
        with open(index, "rb") as file:
            head = file.read(128)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"data.index {index}: {error.strerror}; give another file") from None
    if head and not _HEAD.match(head):
        raise UserError(
            f"data.index {index}: not an image index, so it is not replaced; give another file"
        )


def _write(index: Path, root: str | Path, entries: dict[str, IndexEntry]) -> None:
    _check_replaceable(index)
    content = {"version": _VERSION, "root": _hash_path(root), "files": entries}
    text = json.dumps({"sha256": _checksum(content), "content": content})
    # Escaped, so that a shell that reads the index runs no file name as a command.
    write_text(text.replace("$", "\\u0024").replace("`", "\\u0060"), index)


def _hash_path(root: str | Path) -> str:
    """Identify a data set's folder without its name, because the index may be passed on."""
    return hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
