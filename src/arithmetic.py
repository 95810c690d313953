"""Probes a device's arithmetic and checks that a recipe can be trained with it.

A CPU computes float32 exactly and overflows to infinity in float16. The probes run there too, so
that they are tested.
"""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from src.config import Config, RuntimeConfig
from src.errors import UserError
from src.models.stochastic import hash_equals_numpy

logger = logging.getLogger("cvt")
FIXED_SCALE = 1024


def configure_arithmetic(runtime: RuntimeConfig, device: str) -> None:
    """Set the compilation level, determinism and full float32 precision.

    Raises:
        UserError: the device or MindSpore does not have the level.
    """
    if runtime.jit_level is not None:
        _set_jit_level(runtime, device)
    if runtime.deterministic:  # before communication operators are initialised, which copy it
        try:
            ms.set_deterministic(True)
        except RuntimeError as error:  # a process can set it only once
            if "repeatedly" not in str(error):
                raise
        if device == "GPU":
            logger.warning(
                "runtime.deterministic true: on a GPU, repeated steps differed in rounding "
                "nevertheless (MindSpore 2.8.0 on an H200)"
            )
    if runtime.precision == "float32":
        keep_float32(device)


def keep_float32(device: str) -> None:
    """Compute float32 in float32 for the rest of the process.

    By default Atlas A2 computes convolutions in HF32 and cuDNN in TF32, both with 11 bits. What a
    user's own script has set before stays.
    """
    if device == "Ascend":
        precision = ms.device_context.ascend.op_precision
        switches = precision.conv_allow_hf32, precision.matmul_allow_hf32
    elif device == "GPU":
        precision = ms.device_context.gpu.op_precision
        switches = precision.conv_allow_tf32, precision.matmul_allow_tf32
    else:
        return
    for switch in switches:
        try:
            switch(False)
        except RuntimeError as error:  # Ascend's can be set once
            if "repeatedly" not in str(error):
                raise


def _set_jit_level(runtime: RuntimeConfig, device: str) -> None:
    level = runtime.jit_level
    if runtime.mode != "graph":
        raise UserError(f"runtime.jit_level {level}: needs graphs; set runtime.mode graph")
    if level == "O2" and device != "Ascend":
        raise UserError(
            f"runtime.jit_level O2: is Ascend's graph engine, this runs on {device}; use O0 or O1"
        )
    try:
        ms.set_context(jit_config={"jit_level": level})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"runtime.jit_level {level}: MindSpore {ms.__version__} rejects it "
            f"({str(error).splitlines()[0]}); leave out the key"
        ) from None


def require_precision(precision: str, device: str) -> None:
    """Check that a device supports a precision.

    Raises:
        UserError: bfloat16 on another device than Ascend.
    """
    if precision == "bfloat16" and device != "Ascend":
        other = "float32" if device == "CPU" else "float16 or float32"
        raise UserError(
            f"runtime.precision bfloat16: MindSpore has no such kernels for the {device}; "
            f"use {other}"
        )


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
