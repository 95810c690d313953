"""A lock on an output folder, so that two processes do not write into it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from src.errors import UserError

logger = logging.getLogger("cvt")
LOCK = ".lock"
MARK = "A program that writes into this folder locks this file.\n"  # another's file lacks it


@contextlib.contextmanager
def lock_folder(folder: Path, option: str = "--output") -> Iterator[None]:
    """Hold an exclusive lock on a folder; create the folder if it is missing.

    If the folder is still empty at the end, because the run was refused, it is removed again.

    Args:
        folder: the folder; all who use it must call this function.
        option: the user's option that names the folder.

    Raises:
        UserError: another process holds the lock, or the folder is not writable.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        lock = _locked(folder)
    except BlockingIOError:
        raise UserError(
            f"{folder}: another run is using this folder; wait for it, or give another {option}"
        ) from None
    except OSError as error:
        raise UserError(f"{option} {folder}: {error.strerror}; give another {option}") from None
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError, ValueError):  # it was removed, or is another's file
                if (folder / LOCK).read_text(encoding="utf-8") == MARK:
                    (folder / LOCK).unlink()
            with contextlib.suppress(OSError):  # not empty
                for each in missing:
                    each.rmdir()


def _locked(folder: Path) -> IO:
    """Lock a folder's lock file and return it.

    The holder removes the file before it releases the lock. A process that had already opened
    it would lock a deleted file, which no third process can see, so it tries again.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            try:
                lock = open(folder / LOCK, "x", encoding="utf-8")  # noqa: SIM115 - it is held
            except FileExistsError:
                lock = open(folder / LOCK, "a")  # noqa: SIM115
            else:
                lock.write(MARK)
                lock.flush()
        except FileNotFoundError:  # the folder was removed meanwhile
            continue
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
                    raise
                logger.warning(
                    "%s: this file system has no locks; let no other run use the folder", folder
                )
                return lock
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            lock.close()
            raise
        lock.close()
