"""Checks that MindSpore can use the device; collects versions and variables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from tools.check_device.registry import Finding, Setting

VARIABLES = re.compile(r"(HCCL|MS|ASCEND)_\w+|LD_PRELOAD")
PACKAGES = ("mindspore", "numpy", "onnx", "onnxruntime", "pillow")
CANN_FILES = ("version.cfg", "version.info", "ascend_toolkit_install.info")


def environment(setting: Setting) -> Finding:
    """Collect versions, devices and variables; the worker has already set up the device."""
    import mindspore as ms
    from mindspore import ops

    from src.device import current_device

    device = current_device()
    two = float(ops.add(ms.Tensor(1.0), ms.Tensor(1.0)).asnumpy())
    details = {
        "device": device,
        "versions": versions(),
        "devices": {kind: _count(kind) for kind in ("Ascend", "GPU", "CPU")},
        "variables": {k: v for k, v in sorted(os.environ.items()) if VARIABLES.fullmatch(k)},
    }
    words = [f"MindSpore {ms.__version__}", f"{details['devices'][device]} x {device}"]
    if "CANN" in details["versions"]:
        words.insert(1, f"CANN {details['versions']['CANN']}")
    return Finding(", ".join(words), passed=two == 2.0, hint=f"1 + 1 = {two}", details=details)


def versions() -> dict[str, str]:
    """Return versions of packages, Python, the system, CANN and the driver, if found."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    files = {"driver": [Path("/usr/local/Ascend/driver/version.info")]}
    files["CANN"] = [
        place / name
        for place in (Path(home or "/usr/local/Ascend/ascend-toolkit/latest"),)
        for name in (*CANN_FILES, *(f"{platform.machine()}-linux/{n}" for n in CANN_FILES))
    ]
    for what, places in files.items():
        for place in filter(Path.is_file, places):
            number = re.search(r"\d+\.\d[\w.]*", place.read_text("utf-8", "replace"))
            if number:
                found[what] = number[0]
                break
    return found


def _count(kind: str) -> int:
    """Return the number of devices of a kind that MindSpore can use."""
    from mindspore import device_context

    context = getattr(device_context, kind.lower())
    if not context.is_available():
        return 0
    return 1 if kind == "CPU" else context.device_count()
