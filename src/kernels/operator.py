"""How the compiled library's functions become MindSpore operators with gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

# Elements of an input (2 MiB) up to which a training step keeps the output: launching the operator
# again would cost more time than the memory is worth. Outputs of larger inputs are computed again.
KEPT_SIZE = 2**19


def operator(
    library: Path,
    name: str,
    shapes: Callable,
    bprop: Callable | None = None,
    outputs: int = 1,
    recompute: bool = False,
) -> ops.Custom:
    """Create an operator from a function of the library.

    Args:
        shapes: maps the inputs' shapes to the output's, or to a tuple for several outputs. Like
            `bprop` it must not depend on the cell: MindSpore identifies operators by their name.
        recompute: whether a training step in graph mode computes the outputs again in the backward
            pass instead of keeping them.
    """

    def types(*given):
        for each in given:
            if each.element_type() != mstype.float32:  # its bytes would be read as float32
                raise TypeError(f"the compiled operators take float32, not {each}")
        return mstype.float32 if outputs == 1 else (mstype.float32,) * outputs

    made = ops.Custom(f"{library}:{name}", shapes, types, func_type="aot", bprop=bprop)
    return made.add_prim_attr("recompute", recompute)


def kept_and_recomputed(*args) -> tuple[ops.Custom, ops.Custom]:
    """Create an operator whose outputs are cheap twice: for small inputs and for large ones."""
    return operator(*args), operator(*args, recompute=True)


def integers(*numbers: int) -> Tensor:
    """Pass integers to an operator as the shape of a tensor; each must be 1 or more."""
    return Tensor(np.zeros(numbers, np.float32))
