"""Computes references on the CPU, operator by operator, in MindSpore's own kernels."""

from __future__ import annotations

import numpy as np


def main(what: str, output: str, **arguments: str) -> None:
    """Compute "gradients" or "logits" and write them to a file."""
    from src.config import RuntimeConfig
    from src.device import setup

    setup(RuntimeConfig(device="CPU", mode="pynative", compiled_ops="never"))
    if what == "gradients":
        gradients(output)
    elif what == "logits":
        logits(output, **arguments)
    else:
        raise SystemExit(f"unknown computation: {what}")


def gradients(output: str) -> None:
    """Write every gradient of the official trajectory's first step."""
    from mindspore import Tensor, value_and_grad

    from src.training.loss import LabelSmoothingCrossEntropy
    from tools.check_device.checks.training import TRAJECTORY, batches
    from tools.check_device.golden import official

    net = official.model(TRAJECTORY).set_train(True)
    loss = LabelSmoothingCrossEntropy(TRAJECTORY["label_smoothing"])
    weights = net.trainable_params()
    images, labels = map(Tensor, next(batches(1)))
    forward = value_and_grad(lambda x, y: loss(net(x), y), None, weights)
    _, found = forward(images, labels)
    np.savez(output, **{p.name: value.asnumpy() for p, value in zip(weights, found)})


def logits(output: str, state: str) -> None:
    """Write the logits of a saved state's weights."""
    from mindspore import Tensor

    from src.weights import load_weights
    from tools.check_device.checks.state import network, sample_images

    net = network()
    load_weights(net, state)
    np.save(output, net.set_train(False)(Tensor(sample_images())).asnumpy())
