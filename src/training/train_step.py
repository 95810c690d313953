"""One optimisation step as a graph; everything that changes in training is a parameter of it.

The graph sends no value to the host and does not branch. A step whose loss or gradients are not
finite still runs to the end, but leaves weights and moments unchanged and restores BatchNorm's
running statistics. Only the step counters and the dynamic loss scale change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops, value_and_grad
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer

from src.models.root_cell import RootCell
from src.models.stochastic import hash_bits, sample_keys
from src.training.buckets import pack, unpack
from src.training.optimizer import SGD, AdamW
from src.training.updates import CompiledUpdates, PlainUpdates, mul_no_nan

FIRST_DYNAMIC_SCALE, LARGEST_SCALE, GROWTH_STEPS = 2.0**16, 2.0**24, 2000
STATISTICS = (".moving_mean", ".moving_variance")


class TrainStep(RootCell):
    """Forward, backward, all-reduce, clipping, update and EMA. Call `run_batch` for each batch.

    Args:
        net: images, keys -> logits.
        loss: logits, labels -> scalar; with mixing, also the partner images' labels and the weight
            of the image's own label.
        optimizer: over `net`'s trainable parameters.
        learning_rates: float32 [total steps].
        clip_norm: upper bound of the gradients' global L2 norm; 0 does not clip.
        ema_net: a second network that receives the moving average; None keeps none.
        ema_decay: of the average; it warms up as min(ema_decay, (1 + t) / (10 + t)).
        loss_scale: factor on the loss during the backward pass (for float16); None adapts it.
        accumulate: batches ("parts") whose mean gradient makes one step. If a part is not
            finite, the whole step is skipped, including its finite parts.
        preprocess: maps the host's batches to `net`'s input; None if they need no preprocessing.
        mixing: whether images and labels are mixed as `src.data.mixing` draws it.
        seed: determines, with the step, the random numbers inside the network.
        rank, world: this device's index, and the number of devices that share the global batch.
        library: the compiled operators that update the parameters; None uses MindSpore's.
    """

    def __init__(
        self,
        net: nn.Cell,
        loss: nn.Cell,
        optimizer: AdamW | SGD,
        learning_rates: np.ndarray,
        clip_norm: float = 0.0,
        ema_net: nn.Cell | None = None,
        ema_decay: float = 0.0,
        loss_scale: float | None = 1.0,
        accumulate: int = 1,
        preprocess: nn.Cell | None = None,
        mixing: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        library: Path | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net = net
        self.loss = loss
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.preprocess = preprocess
        self.mixing = mixing
        self.rank, self.world = rank, world
        self.seed = Tensor(np.uint32(seed % 2**32).astype(np.int32))
        self.learning_rates = Tensor(learning_rates)
        self.step = _state("step", 0, mstype.int32)
        self.skipped = _state("skipped", 0, mstype.int32)
        self.dynamic = loss_scale is None
        self.first_scale = loss_scale or FIRST_DYNAMIC_SCALE
        self.loss_scale = _state("loss_scale", self.first_scale, mstype.float32)
        # Finite steps since the scale changed (GradScaler's name); saved states call it "steady".
        self.growth_tracker = _state("steady", 0, mstype.int32)
        self.ema_net = ema_net
        self.ema_decay = ema_decay
        self.statistics = ParameterTuple(
            [p for p in net.get_parameters() if p.name.endswith(STATISTICS)]
        )
        pairs = []
        if ema_net is not None:
            averages = {p.name.removeprefix("ema."): p for p in ema_net.get_parameters()}
            pairs = [(p, averages[p.name]) for p in net.get_parameters()]
        if library is None:
            self.updates = PlainUpdates(optimizer, self.statistics, pairs)
        else:
            shared = world > 1
            self.updates = CompiledUpdates(library, optimizer, self.statistics, pairs, shared)
        if world > 1:
            self.all_reduce = ops.AllReduce()
            self.fraction = Tensor(1.0 / world, mstype.float32)
            self.is_first = Tensor(float(rank == 0), mstype.float32)
        self.forward_backward = value_and_grad(self._forward, None, optimizer.parameters)
        self.parts = _Parts(self) if accumulate > 1 else None

    def reset_loss_scale(self) -> None:
        """Begin with the configured loss scale again, for a run resumed with another one."""
        self.loss_scale.set_data(Tensor(self.first_scale, mstype.float32))
        self.growth_tracker.set_data(Tensor(0, mstype.int32))

    def align_schedule(self, done: int) -> None:
        """Let the next step have the learning rate that follows `done` steps of the schedule.

        `step` counts on from the state, and may differ from `done` where a run is resumed with
        another batch size or other images.
        """
        ahead = int(self.step.asnumpy()) - done
        if ahead:
            rates = self.learning_rates.asnumpy()
            rates = np.concatenate([np.repeat(rates[:1], max(ahead, 0)), rates[max(-ahead, 0) :]])
            self.learning_rates = Tensor(rates)

    def run_batch(
        self,
        images: Tensor,
        labels: Tensor,
        mix: Tensor | None = None,
        part: int = 0,
        boxes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Run one batch; every `accumulate`-th completes a step.

        Args:
            images: float32 [B, 3, H, W], or what `preprocess` takes.
            labels: int32 [B].
            mix: float32 [6] of `src.data.mixing`, where this step mixes.
            part: number of the batch within its step, from 0.
            boxes: for `preprocess`.

        Returns:
            Loss before the update and gradient norm over all devices and parts, float32 scalars
            that may not be finite; None if more parts of the step follow.
        """
        if self.parts is None:
            return self(images, labels, mix, boxes)
        self.parts.add(images, labels, mix, Tensor(part, mstype.int32), boxes)
        return self.parts.update() if part == self.accumulate - 1 else None

    def construct(
        self, images: Tensor, labels: Tensor, mix: Tensor | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run a whole step of one batch; arguments and result as in `run_batch`."""
        before = self.copy_statistics()
        images = ops.depend(images, before)  # the forward pass updates them in place
        loss, gradients = self.backward(images, labels, mix, Tensor(0, mstype.int32), boxes)
        return self.update(loss, gradients, before)

    def copy_statistics(self) -> Tensor:
        """BatchNorm's running statistics as one tensor, float32 [n], or [1] where there are none.

        A back end may optimise a plain copy away and return the parameters themselves.
        """
        if len(self.statistics) == 0:
            return ops.zeros((1,), mstype.float32)
        return self.updates.copy_statistics()

    def _forward(self, images: Tensor, labels: Tensor, mix: Tensor | None, keys: Tensor) -> Tensor:
        if self.mixing:
            others = ops.flip(labels, (0,))
            images = mix_images(images, mix)
            loss = self.loss(self.net(images, keys), labels, others, mix[0])
        else:
            loss = self.loss(self.net(images, keys), labels)
        return loss * self.loss_scale

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        mix: Tensor | None,
        part: Tensor,
        boxes: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scaled loss and gradients of one batch on this device, as `updates` packs them."""
        if self.preprocess is not None:
            images = self.preprocess(images, boxes)
        key = hash_bits(ops.bitwise_xor(hash_bits(self.seed), self.step))
        place = ops.arange(images.shape[0]).astype(mstype.int32) + part * images.shape[0]
        keys = sample_keys(key, place * self.world + self.rank)
        loss, gradients = self.forward_backward(images, labels, mix, keys)
        return loss, self.updates.pack_gradients(gradients)

    def update(
        self, loss: Tensor, gradients: tuple[Tensor, ...], before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update everything from the scaled sums over the parts.

        before: the running statistics as `copy_statistics` gave them before the first part.
        """
        if self.world > 1:
            gradients = self.updates.all_reduce(gradients)
        factor = 1.0 / (self.loss_scale * (self.accumulate * self.world))
        norm = self.gradient_norm(gradients) * factor
        after = self.copy_statistics()
        if self.world > 1:
            loss, norm, after = self._agree(loss, norm, after)
        loss = loss * factor
        finite = ops.logical_and(ops.isfinite(loss), ops.isfinite(norm))
        if len(self.statistics) > 0:
            self.updates.keep_finite_statistics(finite, before, after)
        if self.clip_norm > 0.0:  # as torch.nn.utils.clip_grad_norm_
            factor = factor * ops.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
        lr = ops.gather(self.learning_rates, self.step, 0)
        time = self.step - self.skipped + 1
        done = self.updates.optimize(gradients, factor, lr, time, finite)
        loss = ops.depend(loss, done)
        if self.ema_net is not None:
            self._update_average(finite)
        if self.dynamic:
            self._update_scale(finite)
        ops.assign_add(self.skipped, 1 - finite.astype(mstype.int32))
        ops.assign_add(self.step, Tensor(1, mstype.int32))
        return loss, norm

    def gradient_norm(self, gradients: tuple[Tensor, ...]) -> Tensor:
        """Global L2 norm, a float32 scalar."""
        return self.updates.gradient_norm(gradients)

    def _agree(self, loss: Tensor, norm: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses, the first device's norm and the mean of the running statistics.

        All in one message. Each device could take the norm of the same gradients itself, but a
        device's reductions need not be repeatable: a last bit of difference in the clipping factor
        would drive the weights apart.
        """
        own = (loss, mul_no_nan(norm, self.is_first), after)
        loss, norm, after = unpack(self.all_reduce(pack(own)), (0, 1, 2), own)
        return loss, norm, mul_no_nan(after, self.fraction)

    def _update_average(self, finite: Tensor) -> None:
        time = (self.step - self.skipped).astype(mstype.float32)
        decay = ops.minimum((1.0 + time) / (10.0 + time), Tensor(self.ema_decay, mstype.float32))
        decay = ops.where(finite, decay, Tensor(1.0, mstype.float32))
        self.updates.average(decay)

    def _update_scale(self, finite: Tensor) -> None:
        """Halve the scale at an overflow, double it after GROWTH_STEPS finite steps."""
        scale, steps = self.loss_scale, self.growth_tracker + 1
        grown = ops.where(steps >= GROWTH_STEPS, ops.clamp(scale * 2.0, max=LARGEST_SCALE), scale)
        steps = ops.where(steps >= GROWTH_STEPS, Tensor(0, mstype.int32), steps)
        ops.assign(self.growth_tracker, ops.where(finite, steps, Tensor(0, mstype.int32)))
        ops.assign(self.loss_scale, ops.where(finite, grown, ops.clamp(scale / 2.0, min=1.0)))


def mix_images(images: Tensor, mix: Tensor) -> Tensor:
    """images float32 [B, 3, H, W], mix float32 [6] -> each image mixed with the batch's reverse."""
    rows = ops.arange(images.shape[2]).astype(mstype.float32).reshape((-1, 1))
    columns = ops.arange(images.shape[3]).astype(mstype.float32).reshape((1, -1))
    inside_rows = ops.logical_and(rows >= mix[2], rows < mix[3])
    inside_columns = ops.logical_and(columns >= mix[4], columns < mix[5])
    inside = ops.logical_and(inside_rows, inside_columns).astype(mstype.float32)  # [H, W]
    own = mix[1] * (1.0 - inside)
    return images * own + ops.flip(images, (0,)) * (1.0 - own)


class _Parts:
    """The two graphs of a step in parts: one adds up gradients, the other updates from the sums."""

    def __init__(self, step: TrainStep) -> None:
        sums = ParameterTuple(
            [
                Parameter(
                    initializer("zeros", shape, mstype.float32),
                    name=f"gradient_sum.{number}",
                    requires_grad=False,
                )
                for number, shape in enumerate(step.updates.packed_shapes)
            ]
        )
        loss_sum = _state("loss_sum", 0.0, mstype.float32)
        size = max(sum(int(p.size) for p in step.statistics), 1)
        before = Parameter(
            Tensor(np.zeros(size, np.float32)), name="statistics_before", requires_grad=False
        )
        self.add = _Add(step, sums, loss_sum, before)
        self.update = _Update(step, sums, loss_sum, before)


class _Part(RootCell):
    def __init__(
        self, step: TrainStep, sums: ParameterTuple, loss_sum: Parameter, before: Parameter
    ) -> None:
        super().__init__(auto_prefix=False)
        self.step = step
        self.sums, self.loss_sum, self.before = sums, loss_sum, before


class _Add(_Part):
    def construct(
        self,
        images: Tensor,
        labels: Tensor,
        mix: Tensor | None,
        part: Tensor,
        boxes: Tensor | None = None,
    ) -> Tensor | bool:
        """Arguments as in `TrainStep.run_batch`."""
        ops.assign(self.before, ops.where(part > 0, self.before, self.step.copy_statistics()))
        images = ops.depend(images, self.before)
        loss, gradients = self.step.backward(images, labels, mix, part, boxes)
        keep = (part > 0).astype(mstype.float32)
        ops.assign(self.loss_sum, mul_no_nan(self.loss_sum, keep) + loss)
        return self.step.updates.accumulate(keep, self.sums, gradients)


class _Update(_Part):
    def construct(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm of the step."""
        return self.step.update(self.loss_sum, self.sums, self.before)


def _state(name: str, value: float, dtype: mstype) -> Parameter:
    return Parameter(Tensor(value, dtype), name=name, requires_grad=False)
