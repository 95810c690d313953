"""The part of a training step that treats all parameters alike: norm, update, average.

Two classes have the same methods. `PlainUpdates` uses MindSpore's operators; it packs the gradients
into a few buckets, so the norm, the scaling and the sums over parts take a few launches, and the
optimizer takes one or more for each parameter. `CompiledUpdates` takes one launch for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from src.kernels import update
from src.training.buckets import Buckets, offsets, pack, unpack
from src.training.optimizer import SGD, AdamW

ROW = 1024  # elements per partial sum: summing millions in float32 loses digits

mul_no_nan = ops.MulNoNan()  # 0 if a factor is 0, even if the other is infinite or NaN
_square_sum = ops.MultitypeFuncGraph("square_sum")
_scale = ops.MultitypeFuncGraph("scale")
_average = ops.MultitypeFuncGraph("average")
_assign = ops.MultitypeFuncGraph("assign")
_accumulate = ops.MultitypeFuncGraph("accumulate")


@_square_sum.register("Tensor")
def _square_sum_bucket(bucket):
    return ops.square(bucket).reshape((-1, ROW)).sum(1).sum()


@_scale.register("Tensor", "Tensor")
def _scale_tensor(factor, gradient):
    return mul_no_nan(gradient, factor)


@_average.register("Tensor", "Tensor", "Tensor")
def _average_tensor(decay, average, weight):
    ops.assign(average, average * decay + weight * (1.0 - decay))
    return True


@_assign.register("Tensor", "Tensor")
def _assign_tensor(parameter, value):
    ops.assign(parameter, value)
    return True


@_accumulate.register("Tensor", "Tensor", "Tensor")
def _accumulate_tensor(keep, total, gradient):
    ops.assign(total, mul_no_nan(total, keep) + gradient)  # the last step's total may be NaN
    return True


class PlainUpdates(nn.Cell):
    """Updates with MindSpore's operators, on any device.

    Args:
        optimizer: of the trainable parameters.
        statistics: BatchNorm's running statistics.
        pairs: parameters and their moving averages.
    """

    def __init__(
        self,
        optimizer: AdamW | SGD,
        statistics: ParameterTuple,
        pairs: Sequence[tuple[Parameter, Parameter]],
    ) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.statistics = statistics
        self.statistic_offsets = offsets([int(p.size) for p in statistics])
        self.weights = ParameterTuple([weight for weight, _ in pairs])
        self.averages = ParameterTuple([average for _, average in pairs])
        self.buckets = Buckets(optimizer.parameters, ROW)
        self.packed_shapes = self.buckets.shapes
        self.map = ops.HyperMap()  # compiles faster than a Python loop

    def pack_gradients(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Pack the gradients of all parameters for the other methods."""
        return self.buckets.pack_gradients(gradients)

    def all_reduce(self, packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Sum packed gradients over all devices."""
        return self.buckets.all_reduce(packed)

    def accumulate(self, keep: Tensor, sums: ParameterTuple, packed: tuple[Tensor, ...]) -> bool:
        """Add packed gradients to `sums`; keep = 0, a float32 scalar, resets the sums first."""
        return self.map(ops.partial(_accumulate, keep), sums, packed)

    def gradient_norm(self, packed: tuple[Tensor, ...]) -> Tensor:
        """Return the global L2 norm, a float32 scalar; not finite if a gradient is not finite."""
        return ops.sqrt(ops.addn(self.map(_square_sum, packed)))

    def optimize(
        self, packed: tuple[Tensor, ...], factor: Tensor, lr: Tensor, step: Tensor, active: Tensor
    ) -> bool:
        """Update the parameters with the gradients scaled by `factor`; see the optimizer."""
        factor = ops.where(active, factor, Tensor(0.0, mstype.float32))
        packed = self.map(ops.partial(_scale, factor), packed)
        gradients = self.buckets.unpack_gradients(packed, self.optimizer.parameters)
        return self.optimizer(gradients, lr, step, active)

    def average(self, decay: Tensor) -> bool:
        """Update the moving averages; decay = 1 leaves them unchanged."""
        return self.map(ops.partial(_average, decay), self.averages, self.weights)

    def copy_statistics(self) -> Tensor:
        """Return a copy of all running statistics, float32 [n]."""
        return pack(self.statistics)

    def keep_finite_statistics(self, finite: Tensor, before: Tensor, after: Tensor) -> bool:
        """Set the statistics to `after`, or to `before` if `after` or the step is not finite."""
        # A variance can overflow although loss and gradients are finite; it would stay infinite.
        usable = ops.logical_and(finite, ops.isfinite(after))
        kept = ops.where(usable, after, before)
        kept = unpack(kept, self.statistic_offsets, self.statistics)
        return self.map(_assign, self.statistics, kept)


class CompiledUpdates(nn.Cell):
    """Updates with compiled operators, in float32 on CPUs; same interface as `PlainUpdates`.

    Args:
        library: the compiled operators.
        shared: whether several processes reduce the gradients, which are then packed.
    """

    def __init__(
        self,
        library: Path,
        optimizer: AdamW | SGD,
        statistics: ParameterTuple,
        pairs: Sequence[tuple[Parameter, Parameter]],
        shared: bool,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer
        self.statistics = statistics
        self.weights = ParameterTuple([weight for weight, _ in pairs])
        self.averages = ParameterTuple([average for _, average in pairs])
        self.shared = shared
        self.buckets = Buckets(optimizer.parameters)
        self.packed_shapes = (
            self.buckets.shapes if shared else [tuple(p.shape) for p in optimizer.parameters]
        )
        number = len(self.packed_shapes)
        self.norm = update.GradientNorm(library)
        self.update = optimizer.compiled(library, number)
        self.add = update.AddGradients(library, number)
        self.average_all = update.MovingAverage(library, len(pairs))
        self.all_statistics = update.Statistics(library, len(statistics))

    def pack_gradients(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `PlainUpdates`."""
        return self.buckets.pack_gradients(gradients) if self.shared else gradients

    def all_reduce(self, packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See `PlainUpdates`."""
        return self.buckets.all_reduce(packed)

    def accumulate(self, keep: Tensor, sums: ParameterTuple, packed: tuple[Tensor, ...]) -> Tensor:
        """See `PlainUpdates`."""
        return self.add(keep, sums, packed)

    def gradient_norm(self, packed: tuple[Tensor, ...]) -> Tensor:
        """See `PlainUpdates`."""
        return self.norm(packed)

    def optimize(
        self, packed: tuple[Tensor, ...], factor: Tensor, lr: Tensor, step: Tensor, active: Tensor
    ) -> Tensor:
        """See `PlainUpdates`."""
        states = self.optimizer.states
        scalars = (active.astype(mstype.float32), factor, *self.optimizer.scalars(lr, step))
        return self.update(scalars, states, packed)

    def average(self, decay: Tensor) -> Tensor:
        """See `PlainUpdates`."""
        return self.average_all(decay, self.averages, self.weights)

    def copy_statistics(self) -> Tensor:
        """See `PlainUpdates`."""
        return self.all_statistics(self.statistics)

    def keep_finite_statistics(self, finite: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """See `PlainUpdates`."""
        return self.all_statistics.keep_finite(
            finite.astype(mstype.float32), before, after, self.statistics
        )
