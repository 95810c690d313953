"""How far results may be from the exact ones, by the arithmetic that the device is found to have.

Differences are the largest by the largest value (logits), the norm of the difference by the norm
(gradients, each tensor), or relative (losses, gradient norms). Only the CPU's limits rest on
measurements so far; those of cards are proposals until the first report comes in.
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
    """The limit of a key of LIMITS for a network that computes in `precision`."""
    kind = arithmetic()
    if precision != "float32":
        kind = max(kind, precision, key=KINDS.index)
    return LIMITS[what][KINDS.index(kind)]


@functools.cache
def arithmetic() -> str:
    """What float32 products of this process really are: the coarser of matrix and convolution."""
    return max(products().values(), key=KINDS.index)


@functools.cache
def products() -> dict[str, str]:
    """The arithmetic of a matrix product and of a convolution, one of KINDS each."""
    from mindspore import Tensor, ops

    one = Tensor(np.eye(16, dtype=np.float32))

    def matmul(value: float) -> np.ndarray:
        return ops.matmul(Tensor(np.full((16, 16), value, np.float32)), one).asnumpy()

    def convolution(value: float) -> np.ndarray:
        images = Tensor(np.full((1, 16, 4, 4), value, np.float32))
        return ops.conv2d(images, one.reshape((16, 16, 1, 1))).asnumpy()

    return {"MatMul": _kind(matmul), "Conv2D": _kind(convolution)}


def _kind(product) -> str:
    """Judge by which numbers survive a multiplication by 1."""

    def survives(value: float) -> bool:
        return bool((product(value) == np.float32(value)).all())

    if survives(1 + 2**-12):
        return CPU if current_device() == "CPU" else CARD
    if not survives(65536.0):
        return FLOAT16
    return HF32 if survives(1 + 2**-10) else BFLOAT16
