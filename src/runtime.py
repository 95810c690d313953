"""The device, the environment, seeds and logging: the only room that touches them."""

from __future__ import annotations

import logging
import logging.handlers
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from src.arithmetic import configure
from src.config import RuntimeConfig
from src.errors import UserError, printable

if TYPE_CHECKING:
    from src.ranks import Ranks

DEVICES = ("Ascend", "GPU", "CPU")
logger = logging.getLogger("cvt")


def prepare_environment() -> None:
    """Set what MindSpore reads from the environment when it is imported; what the user set stays.

    Its C++ log is quiet below "critical", because what matters reaches Python as an exception; and
    its scratch files go to the temporary folder instead of the user's.
    """
    _keep_to_own_cores()
    scratch = Path(tempfile.gettempdir()) / f"cvt-mindspore-{os.getuid()}"
    os.environ.setdefault("GLOG_v", "4")
    # OpenMP's threads sleep between two loops: MindSpore's other threads need the cores then.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in ("MS_OM_PATH", "MS_COMPILER_CACHE_PATH", "ASCEND_WORK_PATH"):
        os.environ.setdefault(name, str(scratch))


def _keep_to_own_cores() -> None:
    """Give each of several CPU ranks of a host its share of the cores.

    Every thread of MindSpore inherits it; without it each rank starts a thread per core, and the
    ranks take the cores from each other. The launcher sets the two variables on CPU hosts.
    """
    ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("DEVICE_ID", "0")
    if ranks > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(rank) * len(cores) // ranks : (int(rank) + 1) * len(cores) // ranks]
        os.sched_setaffinity(0, own or cores)


def setup(config: RuntimeConfig) -> tuple[str, Ranks]:
    """Choose the device and the mode, join the other ranks, seed every generator.

    Returns:
        The device's kind, "Ascend", "GPU" or "CPU", and this process's place among the ranks.

    Raises:
        UserError: the device asked for is not here.
    """
    import mindspore as ms  # here, so that prepare_environment can come first

    from src.ranks import is_distributed, join

    available = [kind for kind in DEVICES if _is_available(kind)]
    device = available[0] if config.device == "auto" else config.device
    if device not in available:
        raise UserError(
            f"runtime.device {device}: MindSpore {ms.__version__} finds only "
            f"{', '.join(available)} here; choose one of these or auto"
        )
    if device == "CPU" and config.precision == "bfloat16":
        raise UserError("runtime.precision bfloat16: the CPU has no such kernels; take float32")
    try:
        # A launcher numbers the devices of its host by rank.
        own = os.environ.get("DEVICE_ID") if is_distributed() else None
        ms.set_device(device, config.device_id if own is None else int(own))
    except RuntimeError:  # chosen before in this process, which allows one choice
        if ms.get_context("device_target") != device:
            raise
    ms.set_context(mode=ms.GRAPH_MODE if config.mode == "graph" else ms.PYNATIVE_MODE)
    configure(config, device)
    ranks = join()
    ms.set_seed(config.seed % 2**32)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    return device, ranks


def cache_folder() -> Path:
    """Where what was built for this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvt-mindspore"


def mindspore_version() -> tuple[int, int]:
    """Of the installed one, its first two numbers."""
    import mindspore as ms

    major, minor = ms.__version__.split(".")[:2]
    return int(major), int(minor)


def current_device() -> str:
    """The kind of device that graphs run on now: "Ascend", "GPU" or "CPU"."""
    import mindspore as ms

    return ms.get_context("device_target")


def _is_available(kind: str) -> bool:
    from mindspore import device_context

    return getattr(device_context, kind.lower()).is_available()


def log_to(file: Path | None = None) -> None:
    """Send the log to the console, and to a file as well where one is given.

    The file also gets what was logged since the last call, before it was known.
    """
    logger.setLevel(logging.INFO)
    earlier = [h for h in logger.handlers if isinstance(h, logging.handlers.MemoryHandler)]
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console = ConsoleHandler()
    console.setFormatter(_PrintableFormatter("%(message)s"))
    logger.addHandler(console)
    if file is None:
        logger.addHandler(logging.handlers.MemoryHandler(1000, logging.CRITICAL + 1, None, False))
        return
    to_file = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    # A full disk ends the run with one line where it can lose something: at the next state.
    to_file.handleError = lambda record: None
    to_file.setFormatter(_PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    for record in (record for handler in earlier for record in handler.buffer):
        to_file.handle(record)
    logger.addHandler(to_file)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters of file and class names; line breaks are the message's own."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return "\n".join(map(printable, super().format(record).split("\n")))


class ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record))
