"""The compiled library: built once with the system's C++ compiler, then kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("cpp")
# Neither errno nor trapping keeps loops from becoming vector code; NaN and infinity stay exact.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp-simd", "-pthread", "-fPIC", "-shared",
         "-fno-math-errno", "-fno-trapping-math")  # fmt: skip
COMPILERS = ("g++", "clang++", "c++")
BUILD_SECONDS = 120
MAX_THREADS = 256  # kMaxThreads in cpp/threads.cpp

_loaded: dict[Path, ctypes.CDLL] = {}
_threads: int | None = None


class BuildError(Exception):
    """Why there is no library here; one line."""


def set_threads(number: int | None) -> None:
    """Set the number of threads of the operators in this process.

    Results do not depend on it, to the bit.

    Args:
        number: None takes OMP_NUM_THREADS if it is set, else the cores that the process may use.
    """
    global _threads
    _threads = number
    for loaded in _loaded.values():
        loaded.cvt_set_threads(min(number or _default_threads(), MAX_THREADS))


def _default_threads() -> int:
    # Python's copy of the environment: `import mindspore` sets OMP_NUM_THREADS to 1 in the
    # process's own, where a C++ library would read it.
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def library(folder: Path) -> Path:
    """The path of the library, which is compiled where it is missing.

    Its name follows from the source, the flags, the compiler and the processor, so that none is
    used where it does not belong.

    Args:
        folder: where libraries are kept; created for this user alone where it is missing.

    Raises:
        BuildError: no compiler, it failed, the folder can't be written, or what is there can't be
            loaded or could be another user's work.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler found ({', '.join(COMPILERS)})")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    parts = (*texts, *FLAGS, compiler, version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = folder.resolve()
    built = folder / f"kernels-{name}.so"
    if ":" in str(built):  # MindSpore splits "path:function" there
        raise BuildError(f"{built}: MindSpore can't read a path with a colon")
    if built in _loaded and built.exists():
        return built
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        _require_own(folder)
        if not os.path.lexists(built):
            _compile(compiler, built)
        _require_own(built)
    except OSError as error:
        raise BuildError(f"{folder}: {error.strerror}") from None
    try:
        _loaded[built] = ctypes.CDLL(str(built))
    except OSError as error:  # damaged, or on a file system without execution
        raise BuildError(f"can't be loaded, remove it: {error}") from None
    set_threads(_threads)
    return built


def _require_own(path: Path) -> None:
    """Refuse what another user could have put there: its code would run here."""
    found = os.lstat(path)
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise BuildError(f"{path}: is a link or a special file; remove it")
    if found.st_uid not in (0, os.getuid()):
        raise BuildError(f"{path}: belongs to another user; remove it, or set XDG_CACHE_HOME")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path}: others may write to it; remove it")


def _compile(compiler: str, built: Path) -> None:
    """Compile aside, then rename: ranks that start together may all do it."""
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        aside = Path(folder) / built.name
        sources = map(str, sorted(SOURCES.glob("*.cpp")))
        command = [compiler, *FLAGS, "-o", str(aside), *sources]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} took more than {BUILD_SECONDS} s") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise BuildError(f"{compiler} failed: {reason}")
        aside.chmod(0o700)
        os.replace(aside, built)


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
