"""The device, the environment, seeds and logging: the only room that touches them."""

from __future__ import annotations

import atexit
import importlib.metadata
import logging
import logging.handlers
import os
import random
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from src.arithmetic import configure
from src.config import RuntimeConfig
from src.errors import UserError, printable

if TYPE_CHECKING:
    from src.distributed import Ranks

DEVICES = ("Ascend", "GPU", "CPU")
NUMPY_2 = (2, 9)  # MindSpore from here on is installed with NumPy 2 too
SCRATCH = ("MS_OM_PATH", "MS_COMPILER_CACHE_PATH", "ASCEND_WORK_PATH")
logger = logging.getLogger("cvt")


def prepare_environment() -> None:
    """Set what MindSpore reads from the environment when it is imported; what the user set stays.

    Its C++ log is quiet below "critical", because what matters reaches Python as an exception; and
    its scratch files go to the temporary folder instead of the user's.

    Raises:
        UserError: a NumPy that the installed MindSpore can't work with.
    """
    _require_fitting_numpy()
    _keep_to_own_cores()
    os.environ.setdefault("GLOG_v", "4")
    # OpenMP's threads sleep between two loops: MindSpore's other threads need the cores then.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    missing = [name for name in SCRATCH if name not in os.environ]
    if missing:
        os.environ.update(dict.fromkeys(missing, str(_scratch_folder())))


def _require_fitting_numpy() -> None:
    """Refuse NumPy 2 before MindSpore's import, which would fail at length."""
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        return
    old = tuple(int(part) for part in version.split(".")[:2]) < NUMPY_2
    if old and int(np.__version__.split(".")[0]) >= 2:
        raise UserError(
            f"NumPy {np.__version__} is installed, MindSpore {version} needs NumPy 1: run "
            "python -m pip install 'numpy<2'"
        )


def _scratch_folder() -> Path:
    """A folder of this user's in the temporary folder, where others may have planted its name."""
    folder = Path(tempfile.gettempdir()) / f"cvt-mindspore-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        status = folder.lstat()
        others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not others_write:
            folder.chmod(0o700)
            return folder
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _keep_to_own_cores() -> None:
    """Give each of several CPU ranks of a host its share of the cores.

    Every thread of MindSpore inherits it; without it each rank starts a thread per core, and the
    ranks take the cores from each other. The launcher sets the two variables on CPU hosts.
    """
    ranks, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("DEVICE_ID", "0")
    if ranks > 1 and hasattr(os, "sched_setaffinity"):
        cores = usable_cores()
        own = cores[int(rank) * len(cores) // ranks : (int(rank) + 1) * len(cores) // ranks]
        os.sched_setaffinity(0, own or cores)


def usable_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def setup(config: RuntimeConfig) -> tuple[str, Ranks]:
    """Choose the device and the mode, join the other ranks, seed every generator.

    Returns:
        The device's kind, "Ascend", "GPU" or "CPU", and this process's place among the ranks.

    Raises:
        UserError: the device asked for is not here.
    """
    import mindspore as ms  # here, so that prepare_environment can come first

    from src.distributed import is_distributed, join

    device = _choose_device(config.device)
    if device == "CPU" and config.precision == "bfloat16":
        raise UserError("runtime.precision bfloat16: the CPU has no such kernels; take float32")
    # A launcher numbers the devices of its host by rank.
    own = os.environ.get("DEVICE_ID") if is_distributed() else None
    _set_device(device, config.device_id if own is None else int(own))
    ms.set_context(mode=ms.GRAPH_MODE if config.mode == "graph" else ms.PYNATIVE_MODE)
    configure(config, device)
    ranks = join()
    seed_generators(config.seed)
    return device, ranks


def seed_generators(seed: int) -> None:
    """Seed MindSpore's, Python's and NumPy's generators."""
    import mindspore as ms

    ms.set_seed(seed % 2**32)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _choose_device(asked: str) -> str:
    """The kind of device to run on.

    Raises:
        UserError: it is not here, or auto would pass over Ascend cards that MindSpore can't use.
    """
    import mindspore as ms

    available = [kind for kind in DEVICES if _is_available(kind)]
    cards = sorted(Path("/dev").glob("davinci[0-9]*"))
    if asked == "auto" and cards and "Ascend" not in available:
        raise UserError(
            f"runtime.device auto: {cards[0]} is here, but MindSpore {ms.__version__} can't use "
            f"Ascend{_plugin_fault()}; source CANN's set_env.sh and compare the versions in "
            "docs/install.md, or choose --runtime.device CPU"
        )
    if asked != "auto" and asked not in available:
        raise UserError(
            f"runtime.device {asked}: MindSpore {ms.__version__} finds only "
            f"{', '.join(available)} here{_plugin_fault()}; choose one of these or auto"
        )
    return available[0] if asked == "auto" else asked


def _plugin_fault() -> str:
    """Why MindSpore could not load a device's plugin, in parentheses; "" where it does not say."""
    try:
        from mindspore._c_expression import MSContext

        fault = " ".join(MSContext.get_instance().load_plugin_error().split())
    except (ImportError, AttributeError):
        return ""
    return f" ({fault if len(fault) <= 300 else fault[:299] + '…'})" if fault else ""


def _set_device(device: str, number: int) -> None:
    """Choose the device; a process can do so once, so an equal earlier choice is fine.

    Raises:
        UserError: the process has chosen another device before, or this one can't be used.
    """
    import mindspore as ms

    # Before the attempt, because a refused one still changes device_target (2.8.0).
    before = ms.get_context("device_target"), ms.get_context("device_id")
    try:
        ms.set_device(device, number)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        is_second = "can not be modified" in reason or "has been initialized" in reason
        if is_second and before[0] == device and (device == "CPU" or before[1] == number):
            return
        if is_second:
            reason = f"this process uses {before[0]} {before[1]} already; start a new one"
        raise UserError(f"runtime.device {device}, runtime.device_id {number}: {reason}") from None


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
