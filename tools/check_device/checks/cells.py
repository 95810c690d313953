"""Running a cell forward and backward as one graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, value_and_grad


class _Backward(nn.Cell):
    def __init__(self, cell: nn.Cell, inputs: int, parameters: Sequence[Parameter]) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        positions = tuple(range(1, 1 + inputs))  # behind dy
        weights = ParameterTuple(parameters) if parameters else None
        self.gradients = value_and_grad(self._weighted, positions, weights, has_aux=True)

    def _weighted(self, dy: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y = self.cell(*inputs)
        return (y * dy).sum(), y

    def construct(self, dy: Tensor, *inputs: Tensor) -> tuple:
        """Output and gradients."""
        return self.gradients(dy, *inputs)


def run_both_ways(
    cell: nn.Cell, dy: np.ndarray, *inputs: np.ndarray, parameters: Sequence[Parameter] = ()
) -> tuple[np.ndarray, list[np.ndarray]]:
    """y = cell(*inputs), and the gradients of sum(y * dy): inputs first, then parameters."""
    backward = _Backward(cell, len(inputs), parameters)
    (_, y), gradients = backward(Tensor(dy), *map(Tensor, inputs))
    groups = gradients if parameters else (gradients,)
    flat = [each for group in groups for each in (group if isinstance(group, tuple) else (group,))]
    return y.asnumpy(), [each.asnumpy() for each in flat]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def fill(parameter: Parameter, value: np.ndarray) -> np.ndarray:
    """Give a parameter a value, before anything is compiled; returns it."""
    parameter.set_data(Tensor(value.astype(np.float32)))
    return value
