"""Builds the compiled library with the system's C++ compiler and caches it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from src.cores import cpu_count

SOURCES = Path(__file__).with_name("cpp")
# The two -fno flags allow more vectorisation and keep NaN and infinity exact.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp-simd", "-pthread", "-fPIC", "-shared",
         "-fno-math-errno", "-fno-trapping-math")  # fmt: skip
COMPILERS = ("g++", "clang++", "c++")
BUILD_SECONDS = 120
MAX_THREADS = 256  # kMaxThreads in cpp/threads.cpp

_loaded: dict[Path, ctypes.CDLL] = {}
_threads: int | None = None


class BuildError(Exception):
    """The library cannot be built; the message is one line."""


def set_threads(number: int | None) -> None:
    """Set the number of threads of the operators in this process.

    Results are bitwise independent of it.

    Args:
        number: None takes OMP_NUM_THREADS if it is set, else `cpu_count`.
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
    return cpu_count()


def library(folder: Path) -> Path:
    """Return the path of the library; compile it if it is missing.

    Its name depends on source, flags, compiler and processor, so that each library is used only
    where it fits.

    Args:
        folder: cache folder; created with access for this user only if it is missing.

    Raises:
        BuildError: there is no compiler, it fails, the folder cannot be written, or the library
            cannot be loaded or could be written by another user.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError("MindSpore has custom operators on Linux only")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler found ({', '.join(COMPILERS)})")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise BuildError(f"{compiler}: {error.strerror}") from None
    texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    parts = (*texts, *FLAGS, compiler, version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = folder.resolve()
    built = folder / f"kernels-{name}.so"
    if ":" in str(built):  # MindSpore splits "path:function" there
        raise BuildError(f"{built}: MindSpore cannot read a path with a colon")
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
        raise BuildError(f"{folder}: {error.strerror}; set XDG_CACHE_HOME to another") from None
    try:
        _loaded[built] = ctypes.CDLL(str(built))
    except OSError as error:  # damaged, or on a file system without execution
        raise BuildError(
            f"cannot be loaded: {error}; remove it, or set XDG_CACHE_HOME to a folder from which "
            "programs may run"
        ) from None
    set_threads(_threads)
    return built


def _require_own(path: Path) -> None:
    """Reject a file or folder that another user can write: its code would run here."""
    found = os.lstat(path)
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise BuildError(f"{path}: is a link or a special file; remove it")
    if found.st_uid not in (0, os.getuid()):
        raise BuildError(f"{path}: belongs to another user; remove it, or set XDG_CACHE_HOME")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path}: is writable by others; remove it")


def _compile(compiler: str, built: Path) -> None:
    """Compile to a temporary folder, then rename, because several ranks may compile at once."""

    def run(*arguments: object) -> None:
        command = [compiler, *FLAGS, *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} took more than {BUILD_SECONDS} s") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise BuildError(f"{compiler} failed: {reason}")

    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        partial = Path(folder) / built.name
        objects = {path: Path(folder) / f"{path.stem}.o" for path in SOURCES.glob("*.cpp")}
        with ThreadPoolExecutor(cpu_count()) as pool:  # a file on each core
            list(pool.map(lambda path: run("-c", "-o", objects[path], path), sorted(objects)))
        run("-o", partial, *sorted(objects.values()))
        partial.chmod(0o700)
        os.replace(partial, built)


def _processor() -> str:
    """Return the CPU features that -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
