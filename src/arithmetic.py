"""Probes a device's arithmetic and checks that a recipe can be trained with it.

A CPU computes float32 exactly and overflows to infinity in float16. The probes run there too, so
that they are tested.
"""

from __future__ import annotations

import logging

import numpy as np
from mindspore import Tensor, ops

from src.config import Config
from src.errors import UserError
from src.models.stochastic import hash_equals_numpy

logger = logging.getLogger("cvt")
FIXED_SCALE = 1024


def check_arithmetic(config: Config) -> None:
    """Probe the arithmetic that a training run relies on.

    Raises:
        UserError: the recipe would train incorrectly on this device.
    """
    rates = [config.model.drop_rate, config.model.drop_path_rate]
    rates = [rate for each in rates for rate in (each if isinstance(each, list) else [each])]
    if any(rates) and not hash_equals_numpy():
        raise UserError(
            "model.drop_path_rate, model.drop_rate: this device does not multiply int32 modulo "
            "2^32, so their random numbers would be wrong; set both to 0"
        )
    if config.training.loss_scale == "dynamic" and not overflows_to_infinity():
        raise UserError(
            "training.loss_scale dynamic: float16 saturates on this device (Atlas training cards "
            "do, and Atlas A2 with MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE), so an overflow "
            f"is never detected; set training.loss_scale {FIXED_SCALE}"
        )
    if config.runtime.precision == "float32" and not multiplies_in_float32():
        logger.warning(
            "this device multiplies float32 matrices in lower precision, as Atlas training cards do"
        )


def overflows_to_infinity() -> bool:
    """Return whether float16 60,000 * 2 is infinite and not the largest float16."""
    product = Tensor(np.array([60000], np.float16)) * Tensor(np.array([2], np.float16))
    return not bool(ops.isfinite(product).asnumpy()[0])


def multiplies_in_float32() -> bool:
    """Return whether a matrix product preserves 1 + 2^-12, which float16 and HF32 round to 1."""
    values = np.full((16, 16), 1 + 2**-12, np.float32)
    product = ops.matmul(Tensor(values), Tensor(np.eye(16, dtype=np.float32)))
    return bool((product.asnumpy() == values).all())
