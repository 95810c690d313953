"""The device, the environment, seeds and logging."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import importlib.metadata
import logging
import logging.handlers
import os
import random
import shutil
import signal
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from src.config import RuntimeConfig
from src.cores import usable_cores
from src.errors import UserError, discard_output, printable, shorten

if TYPE_CHECKING:
    from src.distributed import Ranks

DEVICES = ("Ascend", "GPU", "CPU")
NUMPY_2 = (2, 9)  # the first MindSpore that supports NumPy 2
SCRATCH = ("MS_OM_PATH", "MS_COMPILER_CACHE_PATH", "ASCEND_WORK_PATH")
logger = logging.getLogger("cvt")


def prepare_environment() -> None:
    """Set the variables that MindSpore reads when it is imported, unless the user has set them.

    Its C++ log is limited to "critical", because errors also reach Python as exceptions. Its
    scratch files go to the temporary folder instead of the current one.

    Raises:
        UserError: the system is Windows, or the installed MindSpore does not support this NumPy.
    """
    if os.name == "nt":
        raise UserError("Windows is not supported; run this in WSL 2 (docs/install.md)")
    _require_compatible_numpy()
    _bind_to_own_cores()
    os.environ.setdefault("GLOG_v", "4")
    if (
        os.environ.get("MS_COMPILER_CACHE_ENABLE", "0") not in ("", "0")
        and "MS_COMPILER_CACHE_PATH" not in os.environ
    ):
        os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"
        logger.warning(
            "MS_COMPILER_CACHE_ENABLE is turned off: the cache would take a graph with another "
            "run's constants, such as its learning rates; to use it, give each command and "
            "configuration a MS_COMPILER_CACHE_PATH of its own, and leave it out with --resume"
        )
    # Let OpenMP's threads sleep between loops, when MindSpore's other threads need the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    missing = [name for name in SCRATCH if name not in os.environ]
    if missing:
        os.environ.update(dict.fromkeys(missing, str(_scratch_folder())))


def import_mindspore() -> None:
    """Import MindSpore so that Ctrl-C ends the process; an exception would crash the import."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import mindspore  # noqa: F401
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)


def _require_compatible_numpy() -> None:
    """Reject NumPy 2 before MindSpore's import, which would fail with a long traceback."""
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
    """Return this user's scratch folder; another user may already own its name."""
    try:
        folder = Path(tempfile.gettempdir()) / f"cvt-mindspore-{os.getuid()}"
    except FileNotFoundError:
        raise UserError(
            "no folder for temporary files can be written; free some space, or set TMPDIR to one"
        ) from None
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


def _bind_to_own_cores() -> None:
    """Bind each of several CPU ranks on a host to its own cores.

    Every thread of MindSpore inherits this. Otherwise each rank would start a thread per core and
    compete with the others. The launcher sets the two variables on CPU hosts.
    """
    numbers = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("DEVICE_ID", "0")
    if "MS_WORKER_NUM" not in os.environ or not all(map(str.isdecimal, numbers)):
        return  # not a rank, though an earlier job may have left a variable
    ranks, rank = map(int, numbers)
    if ranks > 1 and hasattr(os, "sched_setaffinity"):
        cores = usable_cores()
        own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]
        os.sched_setaffinity(0, own or cores)


def setup(config: RuntimeConfig) -> tuple[str, Ranks]:
    """Choose device and mode, join the other ranks, seed all generators.

    Returns:
        The kind of device, "Ascend", "GPU" or "CPU", and this process's rank.

    Raises:
        UserError: the requested device is not available.
    """
    import mindspore as ms  # not at the top: prepare_environment must run first

    from src.arithmetic import configure_arithmetic, require_precision
    from src.distributed import is_distributed, join

    device = choose_device(config.device)
    require_precision(config.precision, device)
    # The launcher sets DEVICE_ID for each rank, a user by MindSpore's convention for a process.
    own = os.environ.get("DEVICE_ID", "")
    is_own = own.isdecimal() and (is_distributed() or config.device_id is None)
    _set_device(device, int(own) if is_own else config.device_id or 0)
    ms.set_context(mode=ms.GRAPH_MODE if config.mode == "graph" else ms.PYNATIVE_MODE)
    configure_arithmetic(config, device)
    ranks = join()
    seed_generators(config.seed)
    return device, ranks


def seed_generators(seed: int) -> None:
    """Seed MindSpore's, Python's and NumPy's generators."""
    import mindspore as ms

    ms.set_seed(seed % 2**32)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def choose_device(requested: str) -> str:
    """Return the kind of device to run on.

    Raises:
        UserError: it is not available, or auto would ignore Ascend cards that MindSpore cannot use.
    """
    import mindspore as ms

    available = [kind for kind in DEVICES if _is_available(kind)]
    cards = sorted(Path("/dev").glob("davinci[0-9]*"))
    if requested == "auto" and cards and "Ascend" not in available:
        raise UserError(
            f"runtime.device auto: {cards[0]} exists, but MindSpore {ms.__version__} cannot use "
            f"Ascend{_plugin_fault()}; source CANN's set_env.sh and compare the versions in "
            "docs/install.md, or choose --runtime.device CPU"
        )
    if requested != "auto" and requested not in available:
        raise UserError(
            f"runtime.device {requested}: MindSpore {ms.__version__} finds only "
            f"{', '.join(available)} here{_plugin_fault()}; choose one of these or auto"
        )
    return available[0] if requested == "auto" else requested


def _plugin_fault() -> str:
    """Return why MindSpore could not load a plugin, in parentheses; "" if it does not report it."""
    try:
        from mindspore._c_expression import MSContext

        fault = " ".join(MSContext.get_instance().load_plugin_error().split())
    except (ImportError, AttributeError):
        return ""
    return f" ({shorten(fault, 300)})" if fault else ""


def _set_device(device: str, number: int) -> None:
    """Set the device; a process can do so once, so setting the same one again is accepted.

    Raises:
        UserError: the process already uses another device, or this one cannot be used.
    """
    import mindspore as ms

    # Read first, because a failing set_device still changes device_target (2.8.0).
    before = ms.get_context("device_target"), ms.get_context("device_id")
    try:
        ms.set_device(device, number)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        is_second = "can not be modified" in reason or "has been initialized" in reason
        if is_second and before[0] == device and (device == "CPU" or before[1] == number):
            return
        if is_second:
            reason = f"this process uses {before[0]} {before[1]} already; start a new process"
        raise UserError(f"runtime.device {device}, runtime.device_id {number}: {reason}") from None


def cache_folder() -> Path:
    """Return the folder for what is compiled for this machine."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (KeyError, RuntimeError):  # a user without HOME and without an entry in /etc/passwd
        return _scratch_folder()
    return cache / "cvt-mindspore"


def mindspore_version() -> tuple[int, int]:
    """Return the first two numbers of MindSpore's version."""
    import mindspore as ms

    major, minor = ms.__version__.split(".")[:2]
    return int(major), int(minor)


def current_device() -> str:
    """Return the kind of device that graphs run on now: "Ascend", "GPU" or "CPU"."""
    import mindspore as ms

    return ms.get_context("device_target")


def inference_runtime(
    runtime: RuntimeConfig, device: str, given: Collection[str] = ()
) -> RuntimeConfig:
    """Return the settings of a run for using its weights on another device than its own.

    bfloat16 has kernels on Ascend only, and on a CPU float16 has no compiled operators (4 times
    slower), so such weights compute in float32 there. Flash attention and O2 are for Ascend.
    Compiled operators that the run required are used where they are available.

    Args:
        runtime: the settings of the run or recipe.
        device: the kind of device.
        given: names of settings that the user chose for this call; they stay.
    """
    changes: dict[str, Any] = {}
    if "precision" not in given and (
        (device == "CPU" and runtime.precision == "float16")
        or (device != "Ascend" and runtime.precision == "bfloat16")
    ):
        logger.info(
            "computing in float32 instead of %s, which is slow or missing on a %s; "
            "--runtime.precision overrides",
            runtime.precision,
            device,
        )
        changes["precision"] = "float32"
    if device != "Ascend" and "flash_attention" not in given:
        changes["flash_attention"] = False
    if "jit_level" not in given and (
        runtime.mode != "graph" or (runtime.jit_level == "O2" and device != "Ascend")
    ):
        changes["jit_level"] = None
    if runtime.compiled_ops == "always" and "compiled_ops" not in given:
        changes["compiled_ops"] = "auto"
    return dataclasses.replace(runtime, **changes)


def _is_available(kind: str) -> bool:
    from mindspore import device_context

    return getattr(device_context, kind.lower()).is_available()


def log_to(file: Path | None = None) -> None:
    """Send the log to the console, and also to a file if given.

    The file also gets the messages logged since the last call.
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
    # Ignore a full disk here; the next saved state ends the run with one line.
    to_file.handleError = lambda record: None
    to_file.setFormatter(_PrintableFormatter("%(asctime)s %(levelname)s %(message)s"))
    for record in (record for handler in earlier for record in handler.buffer):
        to_file.handle(record)
    logger.addHandler(to_file)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters of file and class names; line breaks stay."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return "\n".join(map(printable, super().format(record).split("\n")))


class ConsoleHandler(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        try:
            tqdm.write(self.format(record))
        except OSError as error:  # a run goes on, or saves and ends
            if error.errno in (errno.EPIPE, errno.EIO):  # `| tee` or the terminal has ended
                discard_output()
