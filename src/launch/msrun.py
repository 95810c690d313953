"""msrun, which ends with all its ranks when the launcher does, be it by SIGKILL.

Run by path: with `python -m` or its console script msrun could import from the user's folder.
"""

from __future__ import annotations

import os
import threading

import psutil
from mindspore.parallel.cluster.run import main


def _end_with_launcher() -> None:
    os.read(0, 1)  # returns when the launcher, which holds the other end, is gone
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    main()
