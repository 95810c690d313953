"""Run msrun, and kill it and its ranks when the launcher exits for any reason, even SIGKILL.

Stop signals to this process do nothing, because a cluster's scheduler signals every process of a
job: the ranks save and end, and msrun after them.

The launcher runs this file by path: `python -m` and msrun's console script would search the
user's working folder for modules.
"""

from __future__ import annotations

import os
import signal
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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, lambda *_: None)  # the ranks would inherit SIG_IGN
    signal.signal = lambda *_: None  # msrun's own handler of SIGINT kills the ranks
    # After a failure msrun gives the path of the scheduler's log to a shell as it is, which would
    # run a name such as $(...). The launcher prints the errors itself.
    os.system = lambda command: 0
    main()
