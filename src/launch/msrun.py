"""Run msrun, and kill it and its ranks when the launcher exits for any reason, even SIGKILL.

The launcher runs this file by path: `python -m` and msrun's console script would search the
user's working folder for modules.
"""

from __future__ import annotations

import os
import threading

import psutil
from mindspore.parallel.cluster.run import main


def _exit_with_launcher() -> None:
    os.read(0, 1)  # returns when the launcher, which holds the pipe's other end, has exited
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    main()
