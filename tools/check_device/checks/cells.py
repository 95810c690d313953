"""Helpers of the checks: run a cell forward and backward as one graph, build a training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, value_and_grad

from src.build import compiled_library
from src.config import RuntimeConfig
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from src.training.train_step import TrainStep


def build_step(
    net: nn.Cell,
    lr: float,
    steps: int,
    optimizer: nn.Optimizer | None = None,
    loss: nn.Cell | None = None,
    runtime: RuntimeConfig | None = None,
    **options,
) -> TrainStep:
    """Build a training step, by default with AdamW and a label smoothing of 0.1."""
    return TrainStep(
        net,
        loss or LabelSmoothingCrossEntropy(0.1),
        optimizer or AdamW(net.trainable_params()),
        np.full(steps, lr, np.float32),
        library=compiled_library(runtime or RuntimeConfig()),
        **options,
    ).set_train(True)


class _Backward(nn.Cell):
    def __init__(self, cell: nn.Cell, inputs: int, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        positions = tuple(range(1, 1 + inputs))  # after dy
        weights = ParameterTuple(parameters) if parameters else None
        self.gradients = value_and_grad(self._weighted, positions, weights, has_aux=True)

    def _weighted(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y = self.cell(*inputs)
        return (y * dy).sum(), y

    def construct(self, dy: Tensor, *inputs: Tensor) -> tuple:
        """Return output and gradients."""
        return self.gradients(dy, *inputs)


def run_forward_backward(
    cell: nn.Cell, dy: np.ndarray, *inputs: np.ndarray, parameters: Sequence[Parameter] = ()
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return y = cell(*inputs) and the gradients of sum(y * dy): inputs, then parameters."""
    backward = _Backward(cell, len(inputs), parameters)
    (_, y), gradients = backward(Tensor(dy), *map(Tensor, inputs))
    groups = gradients if parameters else (gradients,)
    flat = [each for group in groups for each in (group if isinstance(group, tuple) else (group,))]
    return y.asnumpy(), [each.asnumpy() for each in flat]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Return standard normal float32 numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def fill(parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """Set a parameter before anything is compiled; returns the value."""
    parameter.set_data(Tensor(value.astype(np.float32)))
    return value
