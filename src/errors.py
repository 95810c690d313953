"""The exception for users' errors, and how executables report it."""

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

_JOINERS = "\u200c\u200d"  # invisible, but part of words in Persian and Indic scripts, and of emoji

# Failures of the disk or its server, of permissions or the system's limits, reported like users'
# errors. Not every system has all of them.
_SYSTEM_ERROR_NAMES = (
    "EACCES", "EBUSY", "EDQUOT", "EFBIG", "EHOSTDOWN", "EHOSTUNREACH", "EIO", "ELOOP", "EMFILE",
    "ENAMETOOLONG", "ENETUNREACH", "ENFILE", "ENOLCK", "ENOSPC", "ENOTCONN", "EPERM", "EREMOTEIO",
    "EROFS", "ESTALE", "ETIMEDOUT",
)  # fmt: skip
_SYSTEM_ERRORS = {getattr(errno, name, None) for name in _SYSTEM_ERROR_NAMES} - {None}


class UserError(ValueError):
    """An error that the user can correct; executables print it as one line and exit with 2."""


def printable(text: object) -> str:
    """Escape characters of untrusted text that a terminal interprets or cannot show.

    Control characters, those that reorder text, and bytes of a file name that are not UTF-8 become
    `\\n`, `\\x1b`, `\\u202e`, `\\xff`; all other characters stay.
    """
    return "".join(map(_printable, str(text)))


def shorten(value: object, limit: int = 120) -> str:
    """Return a value as text of at most `limit` characters, for a message."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def join_names(names: Sequence[object], limit: int = 10) -> str:
    """Join at most `limit` names for a message: "a, b and 3 more"."""
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def _printable(letter: str) -> str:
    if letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs":
        return letter
    if "\udc80" <= letter <= "\udcff":  # how Python represents a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")


def _exit(fault: object) -> NoReturn:
    _output_fails()
    message = printable(f"{_program()}: error: {fault}")
    print(message, file=sys.stderr)
    sys.exit(2)


def _program() -> str:
    """Return the name of the running program: train.py, or tools.study for a package."""
    folder, name = os.path.split(sys.argv[0])
    return name if name != "__main__.py" else ".".join(folder.split(os.sep)[-2:])


def discard_output() -> None:
    """Send standard output nowhere from now on, because its terminal or pipe has ended.

    The same goes for standard error if it is the same terminal or pipe.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    output, errors = sys.stdout.fileno(), sys.stderr.fileno()
    if os.path.samestat(os.fstat(output), os.fstat(errors)):
        os.dup2(nowhere, errors)
    os.dup2(nowhere, output)


def _output_fails() -> bool:
    """Return whether standard output can't be written; then its content is discarded.

    Otherwise Python would fail on it at its exit, too.
    """
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()
        return True
    return False


def _open_closed_streams() -> None:
    """Open /dev/null in place of standard streams that the shell closed (`2>&-`).

    Otherwise Python has None for them, and the next file that is opened gets their number, and with
    it the messages of C++ code.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end


def executable(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Decorate `main(argv)`: a UserError becomes one line on stderr and exit code 2.

    Lack of memory and system errors such as a full disk are reported the same way. Characters that
    the terminal's encoding lacks are escaped.
    """

    @functools.wraps(main)
    def program() -> None:
        _open_closed_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            os.getcwd()
        except FileNotFoundError:  # MindSpore would crash
            _exit("the current folder was deleted; change to another")
        try:
            main(sys.argv[1:])
            sys.stdout.flush()  # at Python's exit, an error would be no line
        except UserError as error:
            _exit(error)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # the reader of a pipe has exited, as head does
                discard_output()
                sys.exit(128 + signal.SIGPIPE)
            if error.errno not in _SYSTEM_ERRORS:
                raise
            name = error.filename or ("standard output" if _output_fails() else "")
            _exit(f"{shorten(name)}: {error.strerror}" if name else error.strerror)
        except MemoryError as error:
            _exit(f"not enough memory: {error or 'make the network, images or batch smaller'}")

    return program
