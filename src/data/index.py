"""Every file of a data set looked at once, and what was found kept in an index.

The index is JSON: for each file its size, its time of change and what is wrong with it. Only files
that are new, changed since or were broken are read again.

The ranks of a job share the work and exchange what they found every `_ROUND_SECONDS`, because
collectives have time limits (HCCL's are 120 s for the first and half an hour for others). So a rank
waits for others that long at most, plus the time for `_BATCH` files, or for the first one to read
or write the index.
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

from src.data.images import examine
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError
from src.files import require_writable, write_text

_log = logging.getLogger("cvt")

_VERSION = 2  # of the file, and of what `examine` takes for whole
_SAVE_SECONDS = (
    120.0  # ImageNet's takes 6 s to save; what a killed process loses of its work, at most
)
_OURS = re.compile(rb'\{"sha256": "[0-9a-f]{64}", "content": \{')
_MOST_THREADS = 32
_ROUND_SECONDS = 20.0
_BATCH = 128  # files between two looks at the clock


class Entry(NamedTuple):
    """What is known of a file: bytes, time of change in ns, its fault or "", whether EXIF turns it.

    A file that is not there has size -1.
    """

    size: int
    changed: int
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
) -> list[Entry]:
    """Return what there is to say about each file; read only what the index does not know.

    Args:
        files: image files below `root`, the same on every rank.
        root: the data set's folder, to which the index belongs.
        index: where the index is and goes to; made if it is not there. None: no index.
        write: whether to keep what is found, every two minutes and at the end, in `index`, which
            must be missing or an earlier index.
        workers: threads (Pillow decodes outside Python's lock); 0 takes one per core.
        progress: makes the bar from the number of files and a title.
        ranks: those that share the work. The first one alone reads and writes the index; of files
            that needed no reading the others know only that they are whole.

    Raises:
        UserError: the index can't be written, or is a file that this program did not write.
    """
    keep = index is not None and write and ranks.is_first
    if keep:
        _require_ours(index)
    known = _read(index, root) if index is not None and ranks.is_first else {}
    names = [os.path.relpath(file, root) for file in files]
    stamps = dict(_shared(range(len(files)), lambda some: [_stamp(files[k]) for k in some], ranks))
    stale, gone = _sort_out(known, names, stamps, index, root)
    stale = ranks.broadcast_indices(stale, len(files))
    threads = min(workers or _cores(), _MOST_THREADS)
    if ranks.is_first:
        _log.info(
            "%s: checking %d images in %d threads%s, %d more are known", root, len(stale), threads,
            f" on each of {ranks.world} ranks" if ranks.world > 1 else "", len(files) - len(stale),
        )  # fmt: skip
    bar = progress(len(stale), "check images") if progress is not None and ranks.is_first else None
    saved = time.monotonic()
    try:
        # Pillow warns of odd EXIF blocks and of large images; what matters of it is in the fault.
        with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
            warnings.simplefilter("ignore")
            examined = _shared(
                stale, lambda some: list(pool.map(_examine_file, [files[k] for k in some])), ranks
            )
            for k, (fault, turned) in examined:
                known[names[k]] = Entry(*stamps[k], fault, turned)
                if bar is not None:
                    bar.update(1)
                if keep and time.monotonic() - saved > _SAVE_SECONDS:
                    _write(index, root, known)
                    saved = time.monotonic()
    finally:  # what was done before an interruption need not be done again
        if keep and (stale or gone):
            _write(index, root, known)
    if bar is not None:
        bar.close()
    return [known.get(name) or Entry(*stamps[k], "", False) for k, name in enumerate(names)]


def _sort_out(
    known: dict[str, Entry],
    names: Sequence[str],
    stamps: dict[int, tuple[int, int]],
    index: Path | None,
    root: str | Path,
) -> tuple[list[int], list[str]]:
    """Remove from `known` what changed or is gone; returns what to read, and what is gone."""
    changed = [n for k, n in enumerate(names) if n in known and known[n][:2] != stamps[k]]
    here = set(names)
    gone = [name for name in known if name not in here and _stamp(Path(root, name))[0] < 0]
    for what, some in (("changed", changed), ("removed", gone)):
        if some:
            _log.info("%s: %d files were %s since, such as %s", index, len(some), what, some[0])
    for name in gone + changed:
        del known[name]
    return [k for k, name in enumerate(names) if name not in known or known[name].fault], gone


def _shared(
    todo: Sequence[int], work: Callable[[Sequence[int]], Sequence[tuple]], ranks: Ranks
) -> Iterator[tuple[int, tuple]]:
    """Do `work` for every number, shared by the ranks; yields (number, result) on all of them.

    What is left is dealt out anew after each exchange, so that a slow rank does less.
    """
    todo = list(todo)
    seconds = _ROUND_SECONDS if ranks.world > 1 else 0.0
    while todo:
        mine, done = todo[ranks.rank :: ranks.world], []
        end = time.monotonic() + seconds
        while len(done) < len(mine) and (not done or time.monotonic() < end):
            done += work(mine[len(done) : len(done) + _BATCH])
        told = [done]
        if ranks.world > 1:
            told = [json.loads(text) for text in ranks.gather_texts(json.dumps(done))]
        finished = set()
        for rank, results in enumerate(told):
            for k, result in zip(todo[rank :: ranks.world], results):
                finished.add(k)
                yield k, tuple(result)
        todo = [k for k in todo if k not in finished]


def _examine_file(file: str) -> tuple[str, bool]:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        return f"can't be read ({error.strerror})", False
    return examine(content)


def _stamp(file: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _cores() -> int:
    at_hand = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return at_hand or 1


def _read(index: Path, root: str | Path) -> dict[str, Entry]:
    """The entries by file name; none, and a line that says why, if they can't be trusted."""
    try:
        stored = json.loads(index.read_text(encoding="utf-8"))
        content = stored["content"]
        if stored["sha256"] != _checksum(content):
            raise ValueError("its checksum is another")
        if content["version"] != _VERSION:
            raise ValueError("it is of another version of this program")
        if content["root"] != _mark(root):
            raise ValueError("it is of another folder")
        return {name: Entry(*entry) for name, entry in content["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: this index of images is not used, all are read (%s)", index, error)
        return {}


def _require_ours(index: Path) -> None:
    """Refuse to replace a file of the user's, before any work is done for it."""
    require_writable(index, "data.index")
    try:
        with open(index, "rb") as file:
            head = file.read(128)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"data.index {index}: {error.strerror}; give another file") from None
    if head and not _OURS.match(head):
        raise UserError(
            f"data.index {index}: is no index of images, so it is not replaced; give another file"
        )


def _write(index: Path, root: str | Path, entries: dict[str, Entry]) -> None:
    _require_ours(index)
    content = {"version": _VERSION, "root": _mark(root), "files": entries}
    text = json.dumps({"sha256": _checksum(content), "content": content})
    # A file name stays text even if a shell reads the index.
    write_text(text.replace("$", "\\u0024").replace("`", "\\u0060"), index)


def _mark(root: str | Path) -> str:
    """What tells a data set's folder without naming it: the index may be handed on."""
    return hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
