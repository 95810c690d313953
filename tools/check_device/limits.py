"""Limits on differences from the exact results, by the arithmetic detected on the device.

Logits use `by_largest`, gradients `by_norm` for each tensor, losses and gradient norms `relative`.
Only the CPU's limits are based on measurements; those of cards are estimates.
"""

from __future__ import annotations

import functools

import numpy as np

from src.device import current_device

CPU, CARD, HF32, FLOAT16, BFLOAT16 = "CPU float32", "float32", "HF32", "float16", "bfloat16"
KINDS = (CPU, CARD, HF32, FLOAT16, BFLOAT16)  # from exact to coarse
LIMITS = {
    "logits": (1e-5, 1e-4, 5e-3, 2e-2, 1e-1),
    "gradients": (1e-5, 1e-3, 2e-2, 5e-2, 2e-1),
    "loss": (1e-5, 1e-3, 5e-3, 2e-2, 5e-2),
    "gradient norm": (1e-5, 1e-2, 3e-2, 1e-1, 2e-1),
}


def limit(what: str, precision: str = "float32") -> float:
    """Return the limit of a key of LIMITS for a network that computes in `precision`."""
    kind = arithmetic()
    if precision != "float32":
        kind = max(kind, precision, key=KINDS.index)
    return LIMITS[what][KINDS.index(kind)]


@functools.cache
def arithmetic() -> str:
    """Return the actual precision of float32 products, the coarser of MatMul and Conv2D."""
    return max(products().values(), key=KINDS.index)


@functools.cache
def products() -> dict[str, str]:
    """Return the arithmetic of a matrix product and of a convolution, each one of KINDS."""
    from mindspore import Tensor, ops

    one = Tensor(np.eye(16, dtype=np.float32))

    def matmul(value: float) -> np.ndarray:
        return ops.matmul(Tensor(np.full((16, 16), value, np.float32)), one).asnumpy()

    def convolution(value: float) -> np.ndarray:
        images = Tensor(np.full((1, 16, 4, 4), value, np.float32))
        return ops.conv2d(images, one.reshape((16, 16, 1, 1))).asnumpy()

    return {"MatMul": _kind(matmul), "Conv2D": _kind(convolution)}


def _kind(product) -> str:
    """Classify by the numbers that a multiplication by 1 preserves."""

    def survives(value: float) -> bool:
        return bool((product(value) == np.float32(value)).all())

    if survives(1 + 2**-12):
        return CPU if current_device() == "CPU" else CARD
    if not survives(65536.0):
        return FLOAT16
    return HF32 if survives(1 + 2**-10) else BFLOAT16
