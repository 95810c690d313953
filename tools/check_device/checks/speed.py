"""Measures CvT-13's training speed, without a limit, and lists the slowest kernels."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from tools.check_device.checks.training import last_line
from tools.check_device.registry import Finding, Setting

BATCHES = {"CPU": 2, "GPU": 64, "Ascend": 64}
STEPS = {"CPU": 2, "GPU": 20, "Ascend": 20}
PROFILED, KERNELS, IMAGE = 2, 10, 224
HOST_CORES = ("AI_CPU", "HOST_CPU")
FORMS = [(level, form) for level in ("O0", "O1", "O2") for form in ("conv", "shifts")]
FORM_SECONDS = 1200


def speed(setting: Setting) -> Finding:
    """Measure compilation, step, copy and kernels of CvT-13's training step at 224 px."""
    found = measure(setting.device, Path(setting.folder) / "profile")
    words = (
        f"{found['images_per_second']:.1f} img/s at batch {found['batch_size']}, "
        f"compiled in {found['compile_seconds']:.0f} s, "
        f"{len(found['kernels on the host'])} kinds of kernels on the host"
    )
    return Finding(words, details=found)


def measure(device: str, profile: Path | None, form: str = "conv") -> dict[str, Any]:
    """Time a step, and profile it into the folder `profile` unless that is None."""
    from mindspore import Tensor

    from src.build import accelerate, set_precision
    from src.config import IMAGENET_MEAN, IMAGENET_STD, RuntimeConfig
    from src.models import create_model
    from src.training.preprocess import Preprocess
    from tools.check_device.checks.cells import build_step

    precision = "float32" if device == "CPU" else "float16"
    net = set_precision(create_model("cvt_13", 1000, drop_path_rate=(0, 0, 0.1)), precision)
    runtime = RuntimeConfig(precision=precision, depthwise=form)
    accelerate(net, runtime)
    step = build_step(
        net,
        lr=1e-4,
        steps=1000,
        runtime=runtime,
        loss_scale=1.0 if precision == "float32" else 1024.0,
        preprocess=Preprocess((IMAGE, IMAGE), IMAGENET_MEAN, IMAGENET_STD),
    )
    batch = BATCHES[device]
    pixels = np.random.default_rng(0).integers(256, size=(batch, IMAGE, IMAGE, 3))
    pixels = pixels.astype(np.uint8)
    labels = Tensor(np.arange(batch, dtype=np.int32))

    def once(images: Tensor) -> float:
        start = time.perf_counter()
        step.run_batch(images, labels)[0].asnumpy()
        return time.perf_counter() - start

    compile_seconds = once(Tensor(pixels))
    images = Tensor(pixels)
    seconds = statistics.median(once(images) for _ in range(STEPS[device]))
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        (Tensor(pixels) + 1)[:1, :1, :1].asnumpy()  # the copy happens at the first use
        copies.append(time.perf_counter() - start)
    found = {
        "precision": precision, "batch_size": batch, "compile_seconds": compile_seconds,
        "step_seconds": seconds, "images_per_second": batch / seconds,
        "copy_milliseconds": statistics.median(copies) * 1000,
    }  # fmt: skip
    if profile is not None:
        found.update(profile_kernels(device, profile, lambda: once(images)))
    return found


def profile_kernels(device: str, folder: Path, run) -> dict[str, Any]:
    """Profile steps; return the slowest kinds of kernels and all that run on the host.

    MindSpore's profiler writes a table of the host's kernels and, on Ascend, one of the card's.
    """
    from mindspore import profiler
    from mindspore.profiler import ProfilerActivity

    own = {"Ascend": ["NPU"], "GPU": ["GPU"], "CPU": []}[device]
    activities = [getattr(ProfilerActivity, name) for name in ["CPU", *own]]
    handler = profiler.tensorboard_trace_handler(str(folder))
    with profiler.profile(activities=activities, on_trace_ready=handler) as profile:
        for _ in range(PROFILED):
            run()
            profile.step()
    return summarise(folder)


def summarise(folder: Path) -> dict[str, Any]:
    """Summarise a profile's tables by kind of kernel, in milliseconds per step."""
    times: dict[str, float] = defaultdict(float)
    host: dict[str, float] = defaultdict(float)
    for file in folder.rglob("cpu_op_detail_info_*.csv"):
        for row in _rows(file):
            milliseconds = float(row["op_total_time(ms)"])
            times[f"{row['op_type']} (host)"] += milliseconds
            host[row["op_type"]] += milliseconds
    for file in folder.rglob("kernel_details.csv"):
        for row in _rows(file):
            kind, core = row["Type"], row["Accelerator Core"]
            times[f"{kind} ({core})"] += float(row["Duration(us)"]) / 1000
            if core in HOST_CORES:
                host[kind] += float(row["Duration(us)"]) / 1000
    slowest = sorted(times, key=times.get, reverse=True)[:KERNELS]
    return {
        "slowest kernels": {name: round(times[name] / PROFILED, 3) for name in slowest},
        "kernels on the host": {name: round(ms / PROFILED, 3) for name, ms in sorted(host.items())},
    }


def _rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def forms(setting: Setting) -> Finding:
    """Time the step for each jit level and form of the depthwise convolution in new processes."""
    found, faults = {}, []
    for level, form in FORMS:
        if level == "O2" and setting.device != "Ascend":
            continue
        order = json.dumps({"device": setting.device, "level": level, "form": form})
        command = [sys.executable, "-m", "tools.check_device.checks.speed", order]
        name = f"{level}, {form}"
        try:
            done = subprocess.run(
                command, cwd=setting.folder, capture_output=True, text=True, timeout=FORM_SECONDS
            )
        except subprocess.TimeoutExpired:  # the others may still finish
            faults.append(f"{name}: not finished after {FORM_SECONDS} s")
            continue
        if done.returncode:
            faults.append(f"{name}: {last_line(done.stderr)}")
            continue
        found[name] = json.loads(done.stdout.splitlines()[-1])
    speeds = {name: each["images_per_second"] for name, each in found.items()}
    best = max(speeds, key=speeds.get, default="none")
    return Finding(
        f"fastest: {best}, {speeds.get(best, 0):.1f} img/s", passed=not faults,
        hint="; ".join(faults), details={"by level and form": found},
    )  # fmt: skip


def _measure_form(device: str, level: str, form: str) -> None:
    from src.device import prepare_environment, setup

    prepare_environment()
    from src.config import RuntimeConfig

    setup(RuntimeConfig(device=device, jit_level=level))
    print(json.dumps(measure(device, None, form)))


if __name__ == "__main__":
    _measure_form(**json.loads(sys.argv[1]))
