"""Optimizers with PyTorch's semantics, which `nn.AdamWeightDecay` (no bias correction) lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from src.config import OptimizerConfig
from src.kernels.update import Update


def build_optimizer(keys: OptimizerConfig, parameters: Sequence[Parameter]) -> AdamW | SGD:
    """Create the configured optimizer for trainable parameters."""
    if keys.name == "sgd":
        return SGD(parameters, keys.momentum, keys.weight_decay)
    return AdamW(parameters, keys.betas, keys.eps, keys.weight_decay)


def is_decayed(parameter: Parameter) -> bool:
    """Return whether weight decay applies: to the weights of Linears and convolutions only.

    Norms (gamma, beta), biases, class token and position embeddings are not decayed, as in the
    official `set_wd`.
    """
    return parameter.name.endswith(".weight")


_update = ops.MultitypeFuncGraph("adamw_update")


@_update.register("Function", "Tuple", "Tensor", "Bool", "Tensor", "Tensor", "Tensor", "Tensor")
def _update_parameter(adam, scalars, decay, decayed, parameter, moment1, moment2, gradient):
    beta1_power, beta2_power, lr, beta1, beta2, eps = scalars
    if decayed:
        ops.assign(parameter, parameter * decay)
    adam(parameter, moment1, moment2, beta1_power, beta2_power, lr, beta1, beta2, eps, gradient)
    return True


class AdamW(nn.Cell):
    """Adam with bias correction and decoupled weight decay (Loshchilov & Hutter, 2019).

    Equal to `torch.optim.AdamW`. The update runs in the fused `Adam` kernel, which adds
    epsilon before the bias correction; scaling it by sqrt(1 - beta2^t) gives PyTorch's result.

    Args:
        parameters: trainable parameters.
        betas: decay rates of the two moments.
        eps: PyTorch's epsilon.
        weight_decay: applied to the parameters that `is_decayed` names.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.parameters = ParameterTuple(parameters)
        self.moment1 = self.parameters.clone("moment1", init="zeros")
        self.moment2 = self.parameters.clone("moment2", init="zeros")
        self.decayed = tuple(weight_decay > 0 and is_decayed(p) for p in parameters)
        self.weight_decay = weight_decay
        self.beta1 = Tensor(betas[0], mstype.float32)
        self.beta2 = Tensor(betas[1], mstype.float32)
        self.eps = eps
        self.adam = ops.Adam()
        self.states = ParameterTuple([*self.parameters, *self.moment1, *self.moment2])
        self.map = ops.HyperMap()  # compiles faster than a Python loop

    def compiled(self, library: Path, gradients: int) -> Update:
        """Return the update as one compiled operator of `scalars`, `states` and gradients."""
        return Update(library, "adamw", 7, self.decayed, 2, gradients)

    def scalars(self, lr: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Return rate with the bias correction, factor of weight decay, betas and epsilon."""
        time = step.astype(mstype.float32)
        root = ops.sqrt(1.0 - ops.pow(self.beta2, time))
        rate = lr * root / (1.0 - ops.pow(self.beta1, time))
        return rate, 1.0 - lr * self.weight_decay, self.beta1, self.beta2, self.eps * root

    def construct(
        self, gradients: tuple[Tensor, ...], lr: Tensor, step: Tensor, active: Tensor
    ) -> bool:
        """Update the parameters in place.

        gradients: one for each parameter; lr: float32 scalar; step: int32 scalar, counted from 1;
        active: bool scalar; if false, nothing changes (the gradients must then be zero).
        """
        time = step.astype(mstype.float32)
        beta1_power = ops.pow(self.beta1, time)
        beta2_power = ops.pow(self.beta2, time)
        eps = self.eps * ops.sqrt(1.0 - beta2_power)
        lr = ops.where(active, lr, Tensor(0.0, mstype.float32))
        beta1 = ops.where(active, self.beta1, Tensor(1.0, mstype.float32))
        beta2 = ops.where(active, self.beta2, Tensor(1.0, mstype.float32))
        self.map(
            ops.partial(
                _update,
                self.adam,
                (beta1_power, beta2_power, lr, beta1, beta2, eps),
                1.0 - lr * self.weight_decay,
            ),
            self.decayed,
            self.parameters,
            self.moment1,
            self.moment2,
            gradients,
        )
        return True


_descend = ops.MultitypeFuncGraph("sgd_update")


@_descend.register("Function", "Tensor", "Tensor", "Tensor", "Bool", "Tensor", "Tensor", "Tensor")
def _descend_parameter(apply, lr, momentum, decay, decayed, parameter, velocity, gradient):
    if decayed:
        gradient = gradient + decay * parameter
    apply(parameter, velocity, lr, gradient, momentum)
    return True


class SGD(nn.Cell):
    """Gradient descent with momentum; equal to `torch.optim.SGD` without dampening.

    Args:
        parameters: trainable parameters.
        momentum: share of the velocity that is kept.
        weight_decay: added to the gradients of the parameters that `is_decayed` names.
    """

    def __init__(
        self, parameters: Sequence[Parameter], momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(auto_prefix=False)  # the parameters keep their names
        self.parameters = ParameterTuple(parameters)
        self.moments = self.parameters.clone("moments", init="zeros")
        self.decayed = tuple(weight_decay > 0 and is_decayed(p) for p in parameters)
        self.weight_decay = Tensor(weight_decay, mstype.float32)
        self.momentum = Tensor(momentum, mstype.float32)
        self.apply = ops.ApplyMomentum()
        self.states = ParameterTuple([*self.parameters, *self.moments])
        self.map = ops.HyperMap()

    def compiled(self, library: Path, gradients: int) -> Update:
        """Return the update as one compiled operator of `scalars`, `states` and gradients."""
        return Update(library, "sgd", 5, self.decayed, 1, gradients)

    def scalars(self, lr: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Return rate, weight decay and momentum."""
        return lr, self.weight_decay, self.momentum

    def construct(
        self, gradients: tuple[Tensor, ...], lr: Tensor, step: Tensor, active: Tensor
    ) -> bool:
        """Update the parameters in place; arguments as AdamW's, `step` is not used."""
        zero, one = Tensor(0.0, mstype.float32), Tensor(1.0, mstype.float32)
        lr = ops.where(active, lr, zero)
        momentum = ops.where(active, self.momentum, one)
        decay = ops.where(active, self.weight_decay, zero)
        return self.map(
            ops.partial(_descend, self.apply, lr, momentum, decay),
            self.decayed,
            self.parameters,
            self.moments,
            gradients,
        )
