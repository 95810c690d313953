"""Run exported files: .onnx in OpenVINO or onnxruntime, .mindir in MindSpore."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from src.cores import cpu_count, usable_cores
from src.deploy.file_checks import check_mindir, check_onnx
from src.errors import UserError
from src.files import is_utf8
from src.forks import KERNEL_THREADS, register_mindspore_use, thread_names
from src.kernels.library import set_threads

ENGINES = ("auto", "openvino", "onnxruntime", "mindspore")
Run = Callable[[np.ndarray], np.ndarray]  # float32 [B, 3, H, W] -> logits [B, num_classes]
TELEMETRY = "openvino_telemetry"  # a package that comes with OpenVINO
# MindSpore 2.8 crashes if two threads run operators or graphs at once, even of different networks.
MINDSPORE_LOCK = threading.RLock()


class Session:
    """A model opened in an engine; may be called from any thread of its process.

    Args:
        run: float32 [B, 3, H, W] -> logits [B, num_classes].
        engine: the engine's name.
        file: the opened file. None for a network, whose exceptions pass through unchanged.
        lock: held during a call, for engines that accept one call at a time.
    """

    def __init__(self, run: Run, engine: str, file: Path | None = None, lock: Any = None) -> None:
        self.engine = engine
        self._run = run
        self._file = file
        self._lock = lock or contextlib.nullcontext()
        self._process = os.getpid()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Run the model.

        Args:
            images: float32 [B, 3, H, W].

        Returns:
            Logits, float32 [B, num_classes].

        Raises:
            UserError: the engine fails on these images or returns another number of rows, or this
                process is a fork of the one that opened the model.
        """
        if os.getpid() != self._process:  # engines' threads do not survive a fork
            raise UserError(
                f"the model was opened in process {self._process} and does not work after a fork "
                f"in process {os.getpid()}: open it in each worker (gunicorn: without --preload; "
                'multiprocessing: the start method "spawn")'
            )
        with self._lock:
            try:
                logits = np.asarray(self._run(images), np.float32)
            except Exception as error:  # engines raise many kinds
                if self._file is None:
                    raise
                raise UserError(
                    f"{self._file}: {self.engine} can't run it on images {list(images.shape)}: "
                    f"{_reason(error)}"
                ) from error
        if logits.shape[:1] != images.shape[:1]:  # OpenVINO: an earlier call's output
            raise UserError(
                f"{self._file}: {self.engine} returned {list(logits.shape)} for images "
                f"{list(images.shape)}"
            )
        return logits


def open_model(path: str | Path, engine: str = "auto", threads: int | None = None) -> Session:
    """Open an exported .mindir or .onnx file.

    Args:
        path: the file.
        engine: one of `ENGINES`. "auto" means MindSpore for a .mindir; for an .onnx OpenVINO if it
            is installed and the file is not quantized, else onnxruntime.
        threads: computing threads; None leaves the number to the engine, within a container's
            limit.

    Raises:
        UserError: the file is damaged or unsafe, or the engine is missing or can't run it.
    """
    path = Path(path)
    check_engine(path, engine)
    if path.suffix == ".mindir":
        check_mindir(path)
        _require_utf8(path)
        return _open_mindspore(path, threads)
    quantized = check_onnx(path)
    if engine == "auto":  # OpenVINO 2026.4 rejects int8 files
        engine = "openvino" if not quantized and import_optional("openvino") else "onnxruntime"
    if threads is None and cpu_count() < len(usable_cores()):
        threads = cpu_count()  # engines count the cores, not what a container may use of them
    return _OPENERS[engine](path, threads)


def check_engine(path: Path, engine: str) -> None:
    """Check that an engine runs files of this kind.

    Raises:
        UserError: it does not; the message names the engines that do.
    """
    if engine not in ENGINES:
        raise UserError(f"engine {engine}: must be one of {', '.join(ENGINES)}")
    fitting = ("openvino", "onnxruntime") if path.suffix == ".onnx" else ("mindspore",)
    if engine not in ("auto", *fitting):
        kind = path.suffix or "such files"
        raise UserError(f"engine {engine}: {kind} is run by {' or '.join(fitting)}")


def mindspore_session(
    network: Callable, threads: int | None = None, *, compiled: bool = True
) -> Session:
    """Open a network, compiled in graph mode without changing the process's mode.

    Args:
        network: a cell in evaluation mode.
        threads: cores that a call may use. For compiled operators this holds for the whole process.
        compiled: False runs the network in the process's mode instead.
    """
    import mindspore as ms

    register_mindspore_use()
    _set_mindspore_threads(threads)
    run = ms.jit(network) if compiled else network
    bound = _limit_cores(lambda images: run(ms.Tensor(images)).asnumpy(), threads)
    return Session(bound, "mindspore", lock=MINDSPORE_LOCK)


def _set_mindspore_threads(threads: int | None) -> None:
    if threads is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(
            f"threads {threads}: MindSpore's threads can be limited on Linux only; omit it"
        )
    set_threads(threads)


def _limit_cores(run: Run, threads: int | None) -> Run:
    """Restrict MindSpore's threads to `threads` cores while `run` runs.

    MindSpore 2.8 ignores `op_tuning.threads_num`, `runtime.dispatch_threads_num` and
    `runtime_num_threads`, so the affinity of its threads is set instead.
    """
    if threads is None:
        return run

    def bound(images: np.ndarray) -> np.ndarray:
        cores = os.sched_getaffinity(0)
        few = sorted(cores)[:threads]
        if len(few) == len(cores):
            return run(images)
        before = {
            task: name for task, name in thread_names().items() if name.startswith(KERNEL_THREADS)
        }
        own = threading.get_native_id()
        try:
            for task in (own, *before):
                _set_cores(task, few)
            return run(images)
        finally:
            # Threads started during the call have inherited its cores.
            for task, name in thread_names().items():
                if task == own or name.startswith(KERNEL_THREADS):
                    _set_cores(task, cores)

    return bound


def _set_cores(task: int, cores: Iterable[int]) -> None:
    with contextlib.suppress(OSError):  # the thread has ended
        os.sched_setaffinity(task, cores)


def _open_mindspore(path: Path, threads: int | None) -> Session:
    import mindspore as ms

    from src.arithmetic import keep_float32
    from src.device import current_device

    register_mindspore_use()
    keep_float32(current_device())
    _set_mindspore_threads(threads)
    try:
        with MINDSPORE_LOCK:
            graph = ms.nn.GraphCell(ms.load(str(path)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, or not a MINDIR file ({_reason(error)})") from error
    bound = _limit_cores(lambda images: graph(ms.Tensor(images)).asnumpy(), threads)
    return Session(bound, "mindspore", path, MINDSPORE_LOCK)


def _require_utf8(path: Path) -> None:
    if not is_utf8(path):
        raise UserError(f"{path}: opens only in UTF-8; rename the file or its folder")


def _open_onnxruntime(path: Path, threads: int | None) -> Session:
    _require_utf8(path)
    runtime = import_optional("onnxruntime")
    if runtime is None:
        raise UserError(
            f"{path}: ONNX files need OpenVINO or onnxruntime: "
            "pip install openvino, or pip install onnxruntime"
        )
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(
            # A GPU's provider would compute in TF32, and no option asks for one.
            path,
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as error:  # its exceptions have no common base
        raise UserError(f"{path}: onnxruntime rejects it: {_reason(error)}") from error
    given = session.get_inputs()[0]
    dtype = np.float16 if given.type == "tensor(float16)" else np.float32

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(None, {given.name: images.astype(dtype, copy=False)})[0]

    return Session(run, "onnxruntime", path)


def _malloc_is_replaced() -> bool:
    """Return whether another malloc than glibc's comes first, whose memory OpenVINO frees by glibc.

    Seen with OpenVINO 2026.4 and jemalloc or tcmalloc: free(): invalid pointer.
    """
    try:
        libraries = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc
        return False
    first, glibc = (ctypes.cast(each.malloc, ctypes.c_void_p).value for each in libraries)
    return first != glibc


def _open_openvino(path: Path, threads: int | None) -> Session:
    openvino = import_optional("openvino")
    if openvino is None:
        raise UserError(f"{path}: OpenVINO is not installed: pip install openvino")
    if _malloc_is_replaced():
        raise UserError(
            f"{path}: OpenVINO crashes with another allocator than the C library's, such as "
            "jemalloc in LD_PRELOAD; unset that, or take --engine onnxruntime"
        )
    # Without the first setting, OpenVINO computes in bfloat16 on processors that support it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except Exception as error:
        raise UserError(f"{path}: OpenVINO rejects it: {_reason(error)}") from error
    dtype, shape = compiled.input(0).element_type.to_dtype(), compiled.input(0).partial_shape
    local = threading.local()  # an infer request runs one batch at a time

    def run(images: np.ndarray) -> np.ndarray:
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()
        if not shape.compatible(openvino.PartialShape(list(images.shape))):
            raise ValueError(f"it takes {shape}")  # OpenVINO may return its last output instead
        return local.request.infer({0: images.astype(dtype, copy=False)})[0].copy()

    return Session(run, "openvino", path)


_OPENERS = {"openvino": _open_openvino, "onnxruntime": _open_onnxruntime}


def import_optional(name: str) -> Any:
    """Import an optional dependency without its telemetry; None if it is not installed.

    OpenVINO's forks the process to report each import to a server; onnxruntime's queues events with
    the names of files. If an engine was imported before, it already has.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    blocked = [TELEMETRY] if name == "openvino" and TELEMETRY not in sys.modules else []
    sys.modules.update(dict.fromkeys(blocked))  # None: OpenVINO takes it as not installed
    try:
        return __import__(name)
    except ImportError:
        return None
    finally:
        for each in blocked:
            del sys.modules[each]


def _reason(error: Exception) -> str:
    """Return an engine's message without its C++ source locations, at most 300 characters."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    locations = ("Exception from", "Check '", "----")
    return (
        " ".join(line for line in lines if not line.startswith(locations)).strip()[:300]
        or type(error).__name__
    )
