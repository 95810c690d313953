"""The exception for what a user can put right, and how an executable reports it."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can put right; executables print it as one line and exit with code 2."""


def executable(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """Make `main(argv)` a program: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def program() -> None:
        try:
            main(sys.argv[1:])
        except UserError as error:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except BrokenPipeError:  # the reader of a pipe went away, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)

    return program
