"""Checks mixup and cutmix, and measures their cost."""

from __future__ import annotations

import time

import numpy as np
from mindspore import Parameter, Tensor, nn

from src.training.optimizer import SGD
from src.training.train_step import mix_images
from tools.check_device import reference
from tools.check_device.checks.cells import build_step, noise
from tools.check_device.compare import by_largest, check_limits
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting

CLASSES, BATCH, REPEATS = 7, 8, 5
CUTMIX, MIXUP, UNMIXED = [0.75, 1, 2, 10, 3, 11], [0.3, 0.3, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]


class _Mix(nn.Cell):
    def construct(self, images: Tensor, mix: Tensor) -> Tensor:
        """Mix images as the training step does."""
        return mix_images(images, mix)


class _Scale(nn.Cell):
    def construct(self, images: Tensor, mix: Tensor) -> Tensor:
        """Multiply by a scalar, for comparison."""
        return images * mix[1]


class _Pixels(nn.Cell):
    """A network whose logits are pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(np.ones((), np.float32)), name="pixels.weight")

    def construct(self, images: Tensor, keys: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, CLASSES]."""
        return images[:, 0, 0, :CLASSES] * self.weight


def mixing(setting: Setting) -> Finding:
    """Compare mixed images, and the loss of a step on them, with NumPy."""
    images, differences = noise(BATCH, 3, 16, 20), {}
    mix_cell = _Mix()
    for name, mix in (("cutmix", CUTMIX), ("mixup", MIXUP), ("unmixed", UNMIXED)):
        found = mix_cell(Tensor(images), Tensor(np.array(mix, np.float32))).asnumpy()
        differences[f"{name}: images"] = by_largest(found, _mixed(images, mix))
    labels = np.arange(BATCH, dtype=np.int32) * 3 % CLASSES  # not a palindrome
    net = _Pixels()
    optimizer = SGD(net.trainable_params())
    step = build_step(net, 0.0, 9, optimizer, mixing=True)
    for name, mix in (("cutmix", CUTMIX), ("mixup", MIXUP)):
        arguments = Tensor(images), Tensor(labels), Tensor(np.array(mix, np.float32))
        found = step.run_batch(*arguments)[0].asnumpy()
        own, other = (reference.smooth_targets(x, CLASSES, 0.1) for x in (labels, labels[::-1]))
        logits = _mixed(images, mix)[:, 0, 0, :CLASSES]
        right, _ = reference.cross_entropy(logits, mix[0] * own + (1 - mix[0]) * other)
        differences[f"{name}: loss"] = by_largest(found, right)
    finding = check_limits(differences, limit("logits"))
    ratio = _seconds(mix_cell) / _seconds(_Scale())
    finding.measured += f"; takes {ratio:.1f} multiplications"
    finding.details["time by that of a multiplication"] = ratio
    return finding


def _mixed(images: np.ndarray, mix: list[float]) -> np.ndarray:
    fraction = np.full(images.shape[2:], mix[1])
    fraction[mix[2] : mix[3], mix[4] : mix[5]] = 0
    return images * fraction + images[::-1] * (1 - fraction)


def _seconds(cell: nn.Cell) -> float:
    """Return the median time of a call on 8 images of 224 px."""
    images, mix = Tensor(noise(8, 3, 224, 224)), Tensor(np.array(MIXUP, np.float32))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        cell(images, mix)[0, 0, 0, 0].asnumpy()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
