"""One optimisation step as one graph; everything that changes in training is a parameter of it."""

from __future__ import annotations

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops, value_and_grad
from mindspore import dtype as mstype

from src.models.stochastic import hash_bits
from src.training.optimizer import SGD, AdamW

_square_sum = ops.MultitypeFuncGraph("square_sum")
_scale = ops.MultitypeFuncGraph("scale")
_average = ops.MultitypeFuncGraph("average")


@_square_sum.register("Tensor")
def _square_sum_tensor(gradient):
    return ops.square(gradient).sum()


@_scale.register("Tensor", "Tensor")
def _scale_tensor(factor, gradient):
    return gradient * factor


@_average.register("Tensor", "Tensor", "Tensor")
def _average_tensor(decay, average, weight):
    ops.assign(average, average * decay + weight * (1.0 - decay))
    return True


class TrainStep(nn.Cell):
    """Forward, backward, clipping, update and EMA.

    Args:
        net: images, key -> logits.
        loss: logits, labels -> scalar.
        optimizer: over `net`'s trainable parameters.
        learning_rates: float32 [total steps].
        clip_norm: upper bound of the gradients' global L2 norm; 0 does not clip.
        ema_net: a second network that receives the moving average; None keeps none.
        ema_decay: of the average; it warms up as min(ema_decay, (1 + t) / (10 + t)).
        loss_scale: factor on the loss during the backward pass (for float16).
        seed: from which, with the step, the randomness inside the network follows.
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
        loss_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.net = net
        self.loss = loss
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.loss_scale = loss_scale
        self.seed = Tensor(np.uint32(seed % 2**32).astype(np.int32))
        self.learning_rates = Tensor(learning_rates)
        self.step = Parameter(Tensor(0, mstype.int32), name="step", requires_grad=False)
        self.ema_net = ema_net
        self.ema_decay = ema_decay
        if ema_net is not None:
            self.weights = ParameterTuple(list(net.get_parameters()))
            self.averages = ParameterTuple(list(ema_net.get_parameters()))
        self.map = ops.HyperMap()  # compiles faster than a Python loop
        self.forward_backward = value_and_grad(self._forward, None, optimizer.parameters)

    def _forward(self, images: Tensor, labels: Tensor, key: Tensor) -> Tensor:
        return self.loss(self.net(images, key), labels) * self.loss_scale

    def construct(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images float32 [B, 3, H, W], labels int32 [B] -> loss before the update, norm."""
        key = hash_bits(ops.bitwise_xor(hash_bits(self.seed), self.step))
        loss, gradients = self.forward_backward(images, labels, key)
        loss = loss / self.loss_scale
        norm = ops.sqrt(ops.addn(self.map(_square_sum, gradients))) / self.loss_scale
        if self.clip_norm > 0.0 or self.loss_scale != 1.0:
            factor = Tensor(1.0 / self.loss_scale, mstype.float32)
            if self.clip_norm > 0.0:  # as torch.nn.utils.clip_grad_norm_
                factor = factor * ops.clamp(self.clip_norm / (norm + 1e-6), max=1.0)
            gradients = self.map(ops.partial(_scale, factor), gradients)
        lr = ops.gather(self.learning_rates, self.step, 0)
        loss = ops.depend(loss, self.optimizer(gradients, lr, self.step + 1))
        if self.ema_net is not None:
            time = self.step.astype(mstype.float32)
            decay = ops.minimum(
                (1.0 + time) / (10.0 + time), Tensor(self.ema_decay, mstype.float32)
            )
            self.map(ops.partial(_average, decay), self.averages, self.weights)
        ops.assign_add(self.step, Tensor(1, mstype.int32))
        return loss, norm
