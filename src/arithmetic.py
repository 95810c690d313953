"""How a device computes: what a recipe can ask for, and what must be probed on the device itself.

Nothing here has a meaning on a CPU, whose float32 is float32 and whose float16 overflows to
infinity. The probes run there as well, so that they are tested.
"""

from __future__ import annotations

import logging

import numpy as np

from src.config import Config, RuntimeConfig
from src.errors import UserError

logger = logging.getLogger("cvt")
FIXED_SCALE = 1024


def configure(runtime: RuntimeConfig, device: str) -> None:
    """Set the compilation level, determinism and true float32, before the ranks are joined.

    Raises:
        UserError: a level that this device or MindSpore does not have.
    """
    import mindspore as ms

    if runtime.jit_level is not None:
        _set_jit_level(runtime, device)
    if runtime.deterministic:  # communication operators take it over when they are initialised
        try:
            ms.set_deterministic(True)
        except RuntimeError as error:  # a process can set it once
            if "repeatedly" not in str(error):
                raise
    if device == "Ascend" and runtime.precision == "float32":
        # By default Atlas A2 computes float32 convolutions in HF32, of 11 bits.
        precision = ms.device_context.ascend.op_precision
        precision.conv_allow_hf32(False)
        precision.matmul_allow_hf32(False)


def _set_jit_level(runtime: RuntimeConfig, device: str) -> None:
    import mindspore as ms

    level = runtime.jit_level
    if runtime.mode != "graph":
        raise UserError(f"runtime.jit_level {level}: compiles graphs; set runtime.mode graph")
    if level == "O2" and device != "Ascend":
        raise UserError(
            f"runtime.jit_level O2: is Ascend's graph engine, this runs on {device}; take O0 or O1"
        )
    try:
        ms.set_context(jit_config={"jit_level": level})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"runtime.jit_level {level}: MindSpore {ms.__version__} refuses it "
            f"({str(error).splitlines()[0]}); leave the key out"
        ) from None


def check_arithmetic(config: Config) -> None:
    """Probe what a training run relies on, before any image is read.

    Raises:
        UserError: the recipe would train wrongly on this device.
    """
    rates = [config.model.drop_rate, config.model.drop_path_rate]
    rates = [rate for each in rates for rate in (each if isinstance(each, list) else [each])]
    if any(rates) and not hashes_as_numpy():
        raise UserError(
            "model.drop_path_rate, model.drop_rate: this device does not multiply int32 modulo "
            "2^32, so their random numbers would be wrong; set both to 0"
        )
    if config.training.loss_scale == "dynamic" and not overflows_to_infinity():
        raise UserError(
            "training.loss_scale dynamic: float16 saturates on this device (Atlas training cards "
            "do, and Atlas A2 with MS_ASCEND_CHECK_OVERFLOW_MODE=SATURATION_MODE), so an overflow "
            f"is never seen; set training.loss_scale {FIXED_SCALE}"
        )
    if config.runtime.precision == "float32" and not multiplies_in_float32():
        logger.warning(
            "this device multiplies float32 matrices in lower precision, as Atlas training cards do"
        )


def overflows_to_infinity() -> bool:
    """Whether float16 60,000 * 2 is infinite and not the largest float16."""
    from mindspore import Tensor, ops

    product = Tensor(np.array([60000], np.float16)) * Tensor(np.array([2], np.float16))
    return not bool(ops.isfinite(product).asnumpy()[0])


def multiplies_in_float32() -> bool:
    """Whether a matrix product keeps 1 + 2^-12, which float16 and HF32 round to 1."""
    from mindspore import Tensor, ops

    values = np.full((16, 16), 1 + 2**-12, np.float32)
    product = ops.matmul(Tensor(values), Tensor(np.eye(16, dtype=np.float32)))
    return bool((product.asnumpy() == values).all())


def hashes_as_numpy() -> bool:
    """Whether the random bits of drop path equal the same arithmetic in numpy."""
    from mindspore import Tensor

    from src.models.stochastic import hash_bits

    values = (np.arange(1024, dtype=np.uint32) * np.uint32(0x9E3779B9)).view(np.int32)
    expected = values.view(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        expected = (expected ^ (expected >> np.uint32(shift))) * np.uint32(factor)
    return np.array_equal(hash_bits(Tensor(values)).asnumpy().view(np.uint32), expected)
