"""Compiled operators that read or update many tensors in one launch, in place.

`cvt_nano` has 141 parameters. Separate operators for each (square, sum, scale, decay, Adam,
average) make about a thousand launches per step, which take as long as a small batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import signature

READ, WRITE = signature.sig_rw.RW_READ, signature.sig_rw.RW_WRITE


def _in_place(
    library: Path,
    name: str,
    *arguments: tuple,
    shape: Callable = lambda *_: [1],
    bprop: Callable | None = None,
) -> ops.Custom:
    """Create an operator that changes some of its arguments in place.

    The signature passes parameters by reference. The declared side effect orders the operator with
    all others that read or write them, as in MindSpore's own optimizers.

    Args:
        library: the compiled library.
        name: function of the library.
        arguments: (READ or WRITE, count) for each run of consecutive arguments.
        shape: maps the shapes of the inputs to the shape of the output.
        bprop: the gradient, for an operator of the forward pass.
    """
    made = ops.Custom(
        f"{library}:{name}", shape, lambda *_: mstype.float32, func_type="aot", bprop=bprop
    )
    made.add_prim_attr("side_effect_mem", True)
    kinds = [kind for kind, number in arguments for _ in range(number)]
    made.set_signatures(tuple(signature.make_sig(f"x{i}", kind) for i, kind in enumerate(kinds)))
    return made


class GradientNorm(nn.Cell):
    """Global L2 norm of the gradients; not finite if a gradient is not finite."""

    def __init__(self, library: Path) -> None:
        super().__init__(auto_prefix=False)
        self.norm = ops.Custom(
            f"{library}:gradient_norm", lambda *_: [1], lambda *_: mstype.float32, func_type="aot"
        )

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Gradients of any shapes -> a float32 scalar."""
        return self.norm(*gradients).reshape(())


class Update(nn.Cell):
    """The update of an optimizer, for all parameters: `name` is "adamw" or "sgd".

    Args:
        library: the compiled library.
        name: function of the library.
        scalars: how many numbers it takes.
        decayed: for each parameter, whether weight decay applies.
        moments: how many moments a parameter has.
        gradients: tensors that hold the gradients, one for each parameter or fewer buckets.
    """

    def __init__(
        self,
        library: Path,
        name: str,
        scalars: int,
        decayed: Sequence[bool],
        moments: int,
        gradients: int,
    ) -> None:
        super().__init__(auto_prefix=False)
        written = (1 + moments) * len(decayed)
        self.update = _in_place(
            library, name, (READ, scalars + 1), (WRITE, written), (READ, gradients)
        )
        self.decayed = Tensor(np.array(decayed, np.float32))

    def construct(self, scalars: tuple, states: tuple, gradients: tuple) -> Tensor:
        """Update in place.

        Args:
            scalars: float32, as the function lists them.
            states: the parameters, then the moments of each kind.
            gradients: in the order of the parameters.
        """
        return self.update(*scalars, self.decayed, *states, *gradients)


class MovingAverage(nn.Cell):
    """Compute averages = decay * averages + (1 - decay) * values for `number` pairs."""

    def __init__(self, library: Path, number: int) -> None:
        super().__init__(auto_prefix=False)
        # Values are declared as written: otherwise a copy is made of each parameter.
        self.update = _in_place(library, "moving_average", (READ, 1), (WRITE, 2 * number))

    def construct(self, decay: Tensor, averages: tuple, values: tuple) -> Tensor:
        """Update in place; decay is a float32 scalar, 1 to change nothing."""
        return self.update(decay, *values, *averages)


class AddGradients(nn.Cell):
    """Compute sums = keep * sums + gradients for `number` pairs; keep = 0 discards NaN too."""

    def __init__(self, library: Path, number: int) -> None:
        super().__init__(auto_prefix=False)
        self.add = _in_place(library, "add_gradients", (READ, 1 + number), (WRITE, number))

    def construct(self, keep: Tensor, sums: tuple, gradients: tuple) -> Tensor:
        """Update in place; keep is a float32 scalar, 0 or 1."""
        return self.add(keep, *gradients, *sums)


class Statistics(nn.Cell):
    """BatchNorm's running statistics, `number` parameters, read and written as one tensor."""

    def __init__(self, library: Path, number: int) -> None:
        super().__init__(auto_prefix=False)
        self.read = _in_place(
            library,
            "pack",
            (WRITE, number),  # by reference: READ would copy each one
            shape=lambda *shapes: [sum(math.prod(shape) for shape in shapes)],
        )
        self.write = _in_place(library, "keep_finite", (READ, 3), (WRITE, number))

    def construct(self, statistics: tuple) -> Tensor:
        """Return a copy of all statistics, float32 [n]."""
        return self.read(*statistics)

    def keep_finite(
        self, finite: Tensor, before: Tensor, after: Tensor, statistics: tuple
    ) -> Tensor:
        """Set the statistics to `after` [n], or to `before` [n] where `after` is not finite.

        With finite = 0 (a float32 scalar, 0 or 1) all are set to `before`.
        """
        return self.write(finite, before, after, *statistics)


class RunningStatistics(nn.Cell):
    """Moves the running statistics of three BatchNorms towards a batch's; no gradient passes."""

    def __init__(self, library: Path) -> None:
        super().__init__(auto_prefix=False)

        def bprop(
            mq, mk, mv, vq, vk, vv, momenta, corrections, rmq, rmk, rmv, rvq, rvk, rvv, out, dout
        ):
            vectors, threes = (ops.zeros_like(mq),) * 6, (ops.zeros_like(momenta),) * 2
            return (*vectors, *threes, *vectors)

        self.update = _in_place(library, "running_statistics", (READ, 8), (WRITE, 6), bprop=bprop)

    def construct(
        self,
        values: tuple[Tensor, ...],
        running: tuple[Tensor, ...],
        momenta: Tensor,
        corrections: Tensor,
    ) -> Tensor:
        """Update in place.

        Args:
            values: of the batch, three means and three variances [C].
            running: as many parameters.
            momenta: the batch's weights, float32 [3]; 0 changes nothing.
            corrections: factors of the batch's variances, float32 [3].
        """
        return self.update(*values, momenta, corrections, *running)
