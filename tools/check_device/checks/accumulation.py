"""Checks gradient accumulation."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn

from tools.check_device.checks import training
from tools.check_device.compare import by_norm, check_limits, relative
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, Setting


def accumulation(setting: Setting) -> Finding:
    """Compare two parts of four images with one batch of eight, BatchNorm in inference mode."""
    found = {}
    images, labels = next(training.batches(1))
    for parts in (1, 2):
        step = training.make_step(accumulate=parts)
        for _, cell in step.net.cells_and_names():
            if isinstance(cell, nn.BatchNorm2d):
                cell.set_train(False)
        size = len(labels) // parts
        for part in range(parts):
            own = slice(part * size, (part + 1) * size)
            result = step.run_batch(Tensor(images[own]), Tensor(labels[own]), part=part)
        values = training.copy_state(step)
        moments = [value.ravel() for name, value in values.items() if name.startswith("moment1.")]
        found[parts] = np.array([float(x.asnumpy()) for x in result]), np.concatenate(moments)
    (curve, gradient), (right_curve, right) = found[2], found[1]
    return check_limits(
        {"loss and norm": relative(curve, right_curve), "gradients": by_norm(gradient, right)},
        {"loss and norm": limit("loss"), "gradients": limit("gradients")},
    )
