"""The exception for what a user can put right, and how an executable reports it."""

from __future__ import annotations

import errno
import functools
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import NoReturn

_JOINERS = "\u200c\u200d"  # invisible, but letters of Persian, Indic scripts and emoji

# What the disk, its permissions or the system's limits refuse, wherever it happens.
_OF_THE_SYSTEM = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG,
    errno.ENFILE, errno.ENOSPC, errno.EPERM, errno.EROFS,
}  # fmt: skip


class UserError(ValueError):
    """Something the user can put right; executables print it as one line and exit with code 2."""


def printable(text: object) -> str:
    """Escape what a terminal would obey or can't show, so that text from files is safe to print.

    Control characters, those that reorder text, and bytes of a file name that are not UTF-8 become
    `\\n`, `\\x1b`, `\\u202e`, `\\xff`; every other letter stays.
    """
    return "".join(map(_printable, str(text)))


def shown(value: object, most: int = 120) -> str:
    """A value for a message, shortened where it is long."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def join_names(names: Sequence[object], limit: int = 10) -> str:
    """Join at most `limit` names for a message: "a, b and 3 more"."""
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def _printable(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs":
        return letter
    if "\udc80" <= letter <= "\udcff":  # how Python holds a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def _end(fault: object) -> NoReturn:
    message = printable(f"{_program()}: error: {fault}")
    print(message, file=sys.stderr)
    sys.exit(2)


def _program() -> str:
    """Return the name of the running program: train.py, or tools.study for a package."""
    folder, name = os.path.split(sys.argv[0])
    return name if name != "__main__.py" else ".".join(folder.split(os.sep)[-2:])


def executable(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Make `main(argv)` a program: a UserError becomes one line on stderr and exit code 2.

    A lack of memory, and what the system refuses, as on a full disk, are reported the same way.
    Letters that the terminal's encoding lacks are printed as escapes instead of ending the program.
    """

    @functools.wraps(main)
    def program() -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            main(sys.argv[1:])
        except UserError as error:
            _end(error)
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # the reader of a pipe went away, as head does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(128 + signal.SIGPIPE)
            if error.errno not in _OF_THE_SYSTEM:
                raise
            where = f"{shown(error.filename)}: " if error.filename else ""
            _end(f"{where}{error.strerror}")
        except MemoryError as error:
            _end(f"not enough memory: {error or 'make the network, images or batch smaller'}")

    return program
