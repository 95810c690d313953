"""Whole runs of a tiny network on few digits, how to compare them, and a stand-in for a step."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np

from src.config import ModelConfig
from src.config_io import load_config

TIMING = ("seconds", "images_per_second")


class Step(ms.nn.Cell):
    """A training step's parameters: a weight and the number of the step."""

    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor([0.0], ms.float32), name="weight")
        self.step = ms.Parameter(ms.Tensor(0, ms.int32), name="step")

    def at(self, number, weight=0.0):
        self.step.set_data(ms.Tensor(number, ms.int32))
        self.weight.set_data(ms.Tensor([weight], ms.float32))
        return self


def small_cvt(folder, **changes):
    """The shared run's recipe in PyNative mode: nothing to compile."""
    config = load_config(folder / "config.yaml")
    config.runtime.mode = "pynative"
    config.training.batch_size = 50
    return _changed(config, changes)


def small(folder, **changes):
    """With a ResNet of one block, for what does not depend on the network: fewer operators."""
    config = small_cvt(folder)
    size = config.model.image_size
    config.model = ModelConfig("resnet_nano", image_size=size, num_classes=10, depths=[1])
    return _changed(config, changes)


def _changed(config, changes):
    for key, value in changes.items():
        group, _, name = key.partition("__")
        setattr(getattr(config, group), name, value)
    return config


def assert_equal_runs(*folders):
    """Every weight, moment, average and figure of two runs, to the last bit."""
    states = [ms.load_checkpoint(str(run / "checkpoints/last.ckpt")) for run in folders]
    assert states[0].keys() == states[1].keys()
    for name in set(states[0]) - {"progress"}:
        assert np.array_equal(states[0][name].asnumpy(), states[1][name].asnumpy()), name
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if key not in TIMING}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in folders
    ]
    assert rows[0] == rows[1] and rows[0]
