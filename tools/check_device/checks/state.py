"""Checks with runtime.deterministic: repeated steps, a saved state, and that state on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.build import accelerate
from src.config import RuntimeConfig
from src.models import create_model
from src.training.state import Progress, read_newest, save_state
from src.training.train_step import TrainStep
from src.weights import load_weights
from tools.check_device.checks import training
from tools.check_device.checks.cells import build_step, noise
from tools.check_device.compare import by_largest, check_limits
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting

SIZES = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 10}
STEPS = 4
FOLDER, STATE = "states", "states/last.ckpt"


def network(**options):
    """Create a small, newly initialised network."""
    return create_model("cvt_nano", **{**SIZES, **options})


def sample_images() -> np.ndarray:
    """Return the images whose logits are compared."""
    return noise(8, 3, 32, 32, seed=9)


@functools.cache
def _step() -> tuple[TrainStep, dict[str, np.ndarray]]:
    """Build a step with drop path and moving average; return it with its initial state."""
    net, ema_net = (accelerate(network(drop_path_rate=0.2), RuntimeConfig()) for _ in range(2))
    for average, weight in zip(ema_net.get_parameters(), net.get_parameters()):
        average.set_data(weight.value().copy())
    ema_net.update_parameters_name("ema.")
    step = build_step(net, 1e-3, 2 * STEPS, clip_norm=1.0, ema_net=ema_net, ema_decay=0.9)
    ema_net.set_train(False)
    return step, training.copy_state(step)


def _train(step: TrainStep, first: int, last: int) -> None:
    for number in range(first, last):
        labels = (np.arange(8, dtype=np.int32) + number) % 10
        step.run_batch(Tensor(noise(8, 3, 32, 32, seed=number)), Tensor(labels))


def _differing(found: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> Finding:
    """Return a finding on two states that must be bitwise equal."""
    names = [name for name in right if found[name].tobytes() != right[name].tobytes()]
    hint = f"such as {', '.join(names[:4])}" if names else ""
    return Finding(f"{len(names)} of {len(right)} tensors differ", "0", not names, hint)


def determinism(setting: Setting) -> Finding:
    """Run the same steps twice; they must be bitwise equal."""
    step, start = _step()
    _train(step, 0, STEPS)
    first = training.copy_state(step)
    training.restore(step, start)
    _train(step, 0, STEPS)
    return _differing(training.copy_state(step), first)


def resume(setting: Setting) -> Finding:
    """Save half-way, continue, load, continue again; the results must be bitwise equal."""
    step, start = _step()
    checkpoints = Path(setting.folder) / FOLDER
    training.restore(step, start)
    _train(step, 0, STEPS // 2)
    save_state(step, Progress(epoch=1), checkpoints, keep=1)
    _train(step, STEPS // 2, STEPS)
    right = training.copy_state(step)
    read_newest(checkpoints).load(step)
    _train(step, STEPS // 2, STEPS)
    return _differing(training.copy_state(step), right)


def on_cpu(setting: Setting) -> Finding:
    """Compare the logits of saved weights with those of a CPU process."""
    file = Path(setting.folder) / STATE
    if not file.exists():
        step, start = _step()
        training.restore(step, start)
        save_state(step, Progress(), file.parent, keep=1)
    output = Path(setting.folder) / "logits.npy"
    process = training.start_on_cpu(setting, "logits", state=str(file), output=str(output))
    net = accelerate(network(), RuntimeConfig())
    load_weights(net, file)
    found = net.set_train(False)(Tensor(sample_images())).asnumpy()
    training.wait_for_cpu(process)
    return check_limits({"logits": by_largest(found, np.load(output))}, limit("logits"))
