"""Under runtime.deterministic: the same steps again, a saved state, and that state on a CPU."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.build import accelerate, compiled_library
from src.config import RuntimeConfig
from src.models import create_model
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from src.training.state import Progress, load_newest, save_state
from src.training.train_step import TrainStep
from src.weights import load_weights
from tools.check_device.checks import training
from tools.check_device.checks.cells import noise
from tools.check_device.compare import by_largest, judge
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting

SIZES = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 10}
STEPS = 4
FOLDER, STATE = "states", "states/last.ckpt"


def network(**options):
    """A small network, freshly initialised."""
    return create_model("cvt_nano", **{**SIZES, **options})


def probes() -> np.ndarray:
    """Images whose logits are compared."""
    return noise(8, 3, 32, 32, seed=9)


@functools.cache
def _step() -> tuple[TrainStep, dict[str, np.ndarray]]:
    """A step with drop path and moving average, and everything before the first."""
    net, ema_net = (accelerate(network(drop_path_rate=0.2), RuntimeConfig()) for _ in range(2))
    for average, weight in zip(ema_net.get_parameters(), net.get_parameters()):
        average.set_data(weight.value().copy())
    ema_net.update_parameters_name("ema.")
    step = TrainStep(
        net,
        LabelSmoothingCrossEntropy(0.1),
        AdamW(net.trainable_params()),
        np.full(2 * STEPS, 1e-3, np.float32),
        clip_norm=1.0,
        ema_net=ema_net,
        ema_decay=0.9,
        library=compiled_library(RuntimeConfig()),
    ).set_train(True)
    ema_net.set_train(False)
    return step, training.everything(step)


def _train(step: TrainStep, first: int, last: int) -> None:
    for number in range(first, last):
        labels = (np.arange(8, dtype=np.int32) + number) % 10
        step.run_batch(Tensor(noise(8, 3, 32, 32, seed=number)), Tensor(labels))


def _differing(found: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> Finding:
    """A finding on two states that must be equal to the bit."""
    names = [name for name in right if found[name].tobytes() != right[name].tobytes()]
    hint = f"such as {', '.join(names[:4])}" if names else ""
    return Finding(f"{len(names)} of {len(right)} tensors differ", "0", not names, hint)


def determinism(setting: Setting) -> Finding:
    """The same steps twice, to the bit."""
    step, start = _step()
    _train(step, 0, STEPS)
    first = training.everything(step)
    training.restore(step, start)
    _train(step, 0, STEPS)
    return _differing(training.everything(step), first)


def resume(setting: Setting) -> Finding:
    """Save half-way, go on, load, go on again: equal to the bit."""
    step, start = _step()
    checkpoints = Path(setting.folder) / FOLDER
    training.restore(step, start)
    _train(step, 0, STEPS // 2)
    save_state(step, Progress(epoch=1), checkpoints, keep=1)
    _train(step, STEPS // 2, STEPS)
    right = training.everything(step)
    load_newest(step, checkpoints)
    _train(step, STEPS // 2, STEPS)
    return _differing(training.everything(step), right)


def on_cpu(setting: Setting) -> Finding:
    """Logits of the saved weights here and in a CPU process."""
    file = Path(setting.folder) / STATE
    if not file.exists():
        step, start = _step()
        training.restore(step, start)
        save_state(step, Progress(), file.parent, keep=1)
    output = Path(setting.folder) / "logits.npy"
    other = training.start_on_cpu(setting, "logits", state=str(file), output=str(output))
    net = accelerate(network(), RuntimeConfig())
    load_weights(net, file)
    found = net.set_train(False)(Tensor(probes())).asnumpy()
    training.wait_for_cpu(other)
    return judge({"logits": by_largest(found, np.load(output))}, limit("logits"))
