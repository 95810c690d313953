"""Checks the compiled training step: the official trajectory and further properties."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from src.arithmetic import FIXED_SCALE, overflows_to_infinity
from src.build import accelerate, set_precision
from src.config import RuntimeConfig
from src.launch.job import ERROR_LINE
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from src.training.train_step import FIRST_DYNAMIC_SCALE, TrainStep
from tools.check_device.checks.cells import build_step
from tools.check_device.compare import by_largest, by_norm, check_limits, relative
from tools.check_device.golden import official
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting

TRAJECTORY = official.DESCRIPTION["trajectories"][0]
STEPS, EMA_DECAY = TRAJECTORY["steps"], 0.15
# Differences are divided by at least this fraction of the whole gradient's norm: BatchNorm cancels
# almost all of norm1.gamma's gradient (2e-4 of the whole), so that mostly rounding remains.
MIN_FRACTION = 1e-2
CPU_SECONDS = 300


def batches(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the images and labels of the official trajectory."""
    rng = np.random.default_rng([TRAJECTORY["seed"], zlib.crc32(b"data")])
    size, image = TRAJECTORY["batch"], TRAJECTORY["image"]
    for _ in range(count):
        images = rng.standard_normal((size, 3, image, image)).astype(np.float32)
        yield images, rng.integers(0, TRAJECTORY["num_classes"], size).astype(np.int32)


def make_step(precision: str = "float32", **options) -> TrainStep:
    """Build the training step of the official trajectory."""
    runtime = RuntimeConfig(precision=precision)

    def network():
        return accelerate(set_precision(official.model(TRAJECTORY), precision), runtime)

    net = network()
    if "ema_decay" in options:
        options["ema_net"] = network()
        options["ema_net"].update_parameters_name("ema.")
    optimizer = AdamW(
        net.trainable_params(),
        tuple(TRAJECTORY["betas"]),
        TRAJECTORY["eps"],
        TRAJECTORY["weight_decay"],
    )
    loss = LabelSmoothingCrossEntropy(TRAJECTORY["label_smoothing"])
    step = build_step(net, TRAJECTORY["lr"], 2 * STEPS, optimizer, loss, runtime, **options)
    if step.ema_net is not None:
        step.ema_net.set_train(False)
    return step


def run_step(step: TrainStep, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Run a step and return its loss and gradient norm."""
    loss, norm = step.run_batch(Tensor(images), Tensor(labels))
    return float(loss.asnumpy()), float(norm.asnumpy())


def copy_state(step: TrainStep) -> dict[str, np.ndarray]:
    """Copy all parameters of a step."""
    return {p.name: p.asnumpy().copy() for p in step.get_parameters()}


def restore(step: TrainStep, values: dict[str, np.ndarray]) -> None:
    """Restore parameters copied by `copy_state`."""
    for parameter in step.get_parameters():
        ms.ops.assign(parameter, Tensor(values[parameter.name]))


@dataclass
class _Run:
    """The results of the trajectory.

    Args:
        step: the training step after the last step.
        start: its state before the first.
        curve: loss and gradient norm of each step.
        gradients: gradients of the first step, by parameter.
        average: the expected moving average at the end.
    """

    step: TrainStep
    start: dict[str, np.ndarray]
    curve: list[tuple[float, float]] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    average: dict[str, np.ndarray] = field(default_factory=dict)


@functools.cache
def _run() -> _Run:
    """Run twenty steps with moving average, clipping far above the norm, and dynamic loss scale."""
    step = make_step(ema_decay=EMA_DECAY, clip_norm=1e6, loss_scale=None)
    names = [p.name for p in step.net.get_parameters()]
    run = _Run(step, copy_state(step))
    run.average = {name: run.start[name].astype(np.float64) for name in names}
    for time, batch in enumerate(batches(STEPS)):
        run.curve.append(run_step(step, *batch))
        now = copy_state(step)
        if not time:
            share = 1 - TRAJECTORY["betas"][0]
            run.gradients = {
                name.removeprefix("moment1."): value / share
                for name, value in now.items()
                if name.startswith("moment1.")
            }
        decay = min(EMA_DECAY, (1 + time) / (10 + time))
        for name, value in run.average.items():
            run.average[name] = decay * value + (1 - decay) * now[name]
    return run


def gradients(setting: Setting) -> Finding:
    """Compare every gradient of the first step with an operator-by-operator CPU process."""
    file = Path(setting.folder) / "gradients.npz"
    process = start_on_cpu(setting, "gradients", output=str(file))
    found = _run().gradients
    wait_for_cpu(process)
    with np.load(file) as expected:
        right = {name: expected[name] for name in expected.files}
    whole = float(np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in right.values())))
    if set(found) != set(right):
        raise ValueError(f"parameters differ: {sorted(set(found) ^ set(right))[:4]}")
    differences = {name: by_norm(found[name], right[name], MIN_FRACTION * whole) for name in right}
    return check_limits(differences, limit("gradients"))


def start_on_cpu(setting: Setting, what: str, **arguments: str) -> subprocess.Popen:
    """Start a CPU process that computes something.

    It is always the original worker, so that a test's fault affects only the device's process.
    """
    text = json.dumps({"what": what, **arguments})
    command = [sys.executable, "-m", "tools.check_device.worker", "cpu", text]
    return subprocess.Popen(
        command, cwd=setting.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_cpu(process: subprocess.Popen) -> None:
    """Wait for a CPU process to write its result.

    Raises:
        RuntimeError: it failed.
    """
    _, errors = process.communicate(timeout=CPU_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the CPU process failed: {last_line(errors)}")


def last_line(text: str) -> str:
    """Return the last line that names an error, else the last line that is not [INFO]."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    words = errors or [line for line in lines if not line.startswith("[INFO]")]
    return words[-1][:300] if words else "no message"


def trajectory(setting: Setting) -> Finding:
    """Compare losses and gradient norms of twenty steps with the official code's."""
    return _compare_curve(_run().curve, "float32")


def _compare_curve(curve: list[tuple[float, float]], precision: str) -> Finding:
    differences, limits = {}, {}
    kinds = (("loss", "loss"), ("grad_norm", "gradient norm"))
    for column, (key, what) in enumerate(kinds):
        right = official.REFERENCE[f"{TRAJECTORY['tag']}/{key}"]
        differences[what] = relative([row[column] for row in curve], right)
        limits[what] = limit(what, precision)
    finding = check_limits(differences, limits)
    finding.details["curve"] = curve
    return finding


def statistics(setting: Setting) -> Finding:
    """Compare norms of the running statistics after twenty steps with the official code's."""
    run, norms = _run(), TRAJECTORY["param_l2_norm_after"]
    differences = {}
    for parameter in run.step.net.get_parameters():
        name = official.official_name(parameter.name)
        if ".running_" in name:
            norm = np.linalg.norm(parameter.asnumpy().astype(np.float64))
            differences[name] = abs(norm - norms[name]) / norms[name]
    return check_limits(differences, 10 * limit("loss"))


def average(setting: Setting) -> Finding:
    """Compare the moving average with NumPy's average of the weights of each step."""
    run = _run()
    found = {p.name.removeprefix("ema."): p.asnumpy() for p in run.step.ema_net.get_parameters()}
    differences = {name: by_largest(found[name], right) for name, right in run.average.items()}
    return check_limits(differences, 1e-5)


def overflow(setting: Setting) -> Finding:
    """Check that an overflowing step changes nothing but halves the scale; the next is normal."""
    run = _run()
    step = run.step
    restore(step, run.start)
    first, bad, last = batches(3)
    bad = (bad[0].copy(), bad[1])
    bad[0][1, 0, 5, 5] = np.inf
    run_step(step, *first)
    before = copy_state(step)
    loss, norm = run_step(step, *bad)
    after = copy_state(step)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    faults = []
    if np.isfinite(loss) and np.isfinite(norm):
        faults.append("the overflow was not detected: loss and gradient norm are finite")
    left = sorted(changed - {"step", "skipped", "loss_scale", "steady"})
    if left:
        faults.append(f"{len(left)} tensors changed, such as {left[0]}")
    scale = float(after["loss_scale"] / before["loss_scale"])
    if scale != 0.5:
        faults.append(f"the loss scale went to {scale:g} times its value, not to half")
    following = run_step(step, *last)
    if not np.isfinite(following).all():
        faults.append(f"the next step has loss {following[0]}, gradient norm {following[1]}")
    words = f"{len(left)} tensors changed, scale x {scale:g}"
    return Finding(words, "0 tensors, x 0.5", not faults, hint="; ".join(faults))


def repeatability(setting: Setting) -> Finding:
    """Compare three steps with their repetition, without runtime.deterministic."""
    run, curves = _run(), []
    for _ in range(2):
        restore(run.step, run.start)
        curves.append([run_step(run.step, *batch) for batch in batches(3)])
    return check_limits({"loss and gradient norm": relative(curves[0], curves[1])}, limit("loss"))


def trajectory_float16(setting: Setting) -> Finding:
    """Compare the twenty steps in float16; with a fixed loss scale if float16 saturates."""
    scale = None if overflows_to_infinity() else float(FIXED_SCALE)
    step = make_step("float16", loss_scale=scale)
    curve = [run_step(step, *batch) for batch in batches(STEPS)]
    finding = _compare_curve(curve, "float16")
    finding.details["loss scale"] = float(step.loss_scale.asnumpy())
    if int(step.skipped.asnumpy()):
        finding.hint += f"; {int(step.skipped.asnumpy())} steps overflowed from a scale of "
        finding.hint += f"{scale or FIRST_DYNAMIC_SCALE:g}"
    return finding
