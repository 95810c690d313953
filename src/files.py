"""Atomic writers for text, JSON, CSV and other files; checks of output files; checksums."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError

PARTIAL = ".partial-"  # in the name of a temporary folder, before its random end


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends without an error, it replaces `path`.

    The path yielded has the same name in a new private folder beside the target, so links
    of other users are not followed, and a reader sees either the whole old file or the whole new
    one. Missing parent folders are created. The file gets the permissions of the user's umask, even
    if the library that wrote it chose others, and survives a power failure.

    Errors of the block that name the path yielded name `path` instead.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    with replacing_together(path) as (unfinished,):
        yield unfinished


@contextlib.contextmanager
def replacing_together(*paths: str | Path) -> Iterator[list[Path]]:
    """Like `replacing`, for files that belong together: all are complete before one is replaced."""
    targets = list(map(Path, paths))
    with contextlib.ExitStack() as folders:
        unfinished = [folders.enter_context(_folder_beside(each)) / each.name for each in targets]
        yield unfinished
        for each in unfinished:
            with open(each.parent / ".mode", "xb") as usual:  # created to read the default mode
                mode = os.fstat(usual.fileno()).st_mode
            each.chmod(mode & 0o777)
            with open(each, "rb") as file:
                os.fsync(file.fileno())
        for each, target in zip(unfinished, targets):
            os.replace(each, target)
            _flush_folder(target.parent)


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}"))
    try:
        yield folder
    except (OSError, RuntimeError, ValueError) as error:
        _replace_in(error, str(folder / path.name), str(path))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_in(error: Exception, old: str, new: str) -> None:
    """Replace a file's name in an error; the user knows nothing of a temporary file."""
    error.args = tuple(arg.replace(old, new) if isinstance(arg, str) else arg for arg in error.args)
    if isinstance(error, OSError):
        for name in ("filename", "filename2"):  # of a copy: from, to
            if isinstance(getattr(error, name), (str, bytes, os.PathLike)):
                setattr(error, name, os.fsdecode(getattr(error, name)).replace(old, new))


def remove_unfinished(folder: Path, *names: str) -> None:
    """Remove the temporary folders of processes killed inside `replacing`.

    Args:
        folder: the folder.
        names: patterns of the files that only the caller writes; by default all files. Another
            process may be writing others.
    """
    for name in names or ("*",):
        for left in folder.glob(f".{name}{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)


def write_json(content: Any, path: str | Path) -> None:
    """Write JSON.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(as_json(content), path)


def as_json(content: Any) -> str:
    """Return JSON as `write_json` writes it."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_csv(head: Sequence[str], rows: Iterable[Sequence[Any]], path: str | Path) -> None:
    """Write a table.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_text(text.getvalue(), path)


def write_text(text: str, path: str | Path) -> None:
    """Write a UTF-8 text file; bytes of a file name that are not UTF-8 are escaped as \\udcXX.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(as_utf8(text))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a writable file") from None


def as_utf8(text: str) -> bytes:
    """Encode a text; bytes of a file name that are not UTF-8 are escaped as \\udcXX."""
    return text.encode("utf-8", "backslashreplace")


def is_utf8(path: Path) -> bool:
    """Return whether a path is UTF-8; Python holds other bytes of a file name as surrogates."""
    return str(path).encode(errors="replace").decode() == str(path)


def require_writable(path: str | Path, option: str) -> None:
    """Check early that an output file can be written.

    Args:
        path: the file; its parent folders need not exist yet.
        option: the user's option, such as "--json".

    Raises:
        UserError: it is a folder or a device, a parent is a file, or the folder is not writable.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file")
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced, not written to
        raise UserError(f"{option} {path}: is not a regular file; give another file")
    parent = next(each for each in path.absolute().parents if os.path.lexists(each))
    if not parent.is_dir():
        raise UserError(f"{option} {path}: {parent} is not a folder; give another file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {parent} is not writable; give another file")


def require_different(outputs: dict[str, str | None]) -> None:
    """Check that no two output options name the same file.

    Args:
        outputs: the options and their paths; None for an option that was not given.

    Raises:
        UserError: two are the same.
    """
    given = {option: path for option, path in outputs.items() if path is not None}
    if len({os.path.realpath(path) for path in given.values()}) < len(given):
        raise UserError(f"{', '.join(given)}: name the same file; give each its own")


def require_replaceable(
    path: str | Path, option: str, is_ours: Callable[[Path], bool], force: bool = False
) -> None:
    """Check that an output file can be written without overwriting another file of the user.

    Args:
        path: the file; it may be missing, empty, or an earlier result.
        option: the user's option, such as "--json".
        is_ours: returns whether an existing file is an earlier result (`is_json`, `is_csv`).
        force: replace any file.

    Raises:
        UserError: it cannot be written, or is another file.
    """
    require_writable(path, option)
    path = Path(path)
    if force or not os.path.lexists(path):
        return
    try:
        ours = path.is_file() and (path.stat().st_size == 0 or is_ours(path))
    except OSError:
        ours = False
    if not ours:
        raise UserError(
            f"{option} {path}: exists and is not an earlier result of this command; give another "
            "name, or add --force to replace it"
        )


def is_json(path: Path, fits: Callable[[Any], bool]) -> bool:
    """Return whether a file is JSON that `fits` accepts.

    Invalid JSON, or an error of `fits` on an unexpected structure, means no.
    """
    try:
        return bool(fits(json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def is_csv(path: Path, head: Sequence[str]) -> bool:
    """Return whether a file is a table of `write_csv` with these first columns."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(head)
    with open(path, "rb") as file:
        return file.readline().rstrip(b"\n").startswith(text.getvalue().encode())


def _flush_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure, if the system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: str | Path, *more: str | Path) -> str:
    """Return the SHA-256 in hexadecimal of one file, or of several files concatenated."""
    digest = hashlib.sha256()
    for each in (path, *more):
        with open(each, "rb") as file:
            for block in iter(lambda file=file: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()
