"""Gradients in a few large tensors.

Each operator costs a launch and each message a latency on a card, and CvT-13 has 342
gradients. MindSpore's own fusion of all-reduces is off by default and depends on the back end, so
the gradients are packed here, where every device sends the same few messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

BUCKET_BYTES = 64 * 2**20
MAX_BUCKETS = 3

_map = ops.HyperMap()  # compiles faster than a Python loop
_flatten = ops.MultitypeFuncGraph("flatten")
_piece = ops.MultitypeFuncGraph("piece")


@_flatten.register("Tensor")
def _flatten_tensor(value):
    return value.reshape((-1,))


@_piece.register("Tensor", "Number", "Tensor")
def _piece_of_tensor(flat, begin, like):
    return ops.slice(flat, (begin,), (like.size,)).reshape(like.shape)


def offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return where each of several tensors starts in their concatenation, from their sizes."""
    return tuple(np.cumsum([0, *sizes[:-1]]).tolist())


def pack(values: tuple[Tensor, ...]) -> Tensor:
    """Concatenate tensors of any shapes: float32 [n]."""
    return ops.cat(_map(_flatten, values))


def unpack(flat: Tensor, starts: tuple[int, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Undo `pack`: tensors in the shapes of `like`, whose `offsets` are `starts`.

    Uses `Slice`, because few devices have kernels that split into unequal pieces.
    """
    return _map(ops.partial(_piece, flat), starts, like)


def bucket_bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Split consecutive gradients into at most three buckets, each of 64 MB or more if needed.

    Args:
        sizes: elements of each float32 gradient.

    Returns:
        First gradient of each bucket and the index after its last.
    """
    limit = max(BUCKET_BYTES, -(-4 * sum(sizes) // MAX_BUCKETS))
    bucket = 4 * np.array(offsets(sizes)) // limit
    edges = [0, *(np.flatnonzero(np.diff(bucket)) + 1).tolist(), len(sizes)]
    return list(zip(edges[:-1], edges[1:]))


class Buckets(nn.Cell):
    """Gradients in a few flat tensors, for what is done with all of them alike.

    Args:
        parameters: those that the gradients belong to.
        multiple: of elements; shorter buckets end in zeros.
    """

    def __init__(self, parameters: Sequence[Parameter], multiple: int = 1) -> None:
        super().__init__(auto_prefix=False)
        sizes = [int(parameter.size) for parameter in parameters]
        self.bounds = tuple(bucket_bounds(sizes))
        self.offsets = tuple(offsets(sizes[start:stop]) for start, stop in self.bounds)
        contents = [sum(sizes[start:stop]) for start, stop in self.bounds]
        self.padding = tuple(-content % multiple for content in contents)
        self.shapes = [(size + pad,) for size, pad in zip(contents, self.padding)]
        self.reduce = ops.AllReduce()

    def pack_gradients(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of any shapes -> buckets, float32 [n]."""
        buckets = ()
        for (start, stop), padding in zip(self.bounds, self.padding):
            own = gradients[start:stop]
            if padding:
                own += (ops.zeros((padding,), mstype.float32),)
            buckets += (pack(own),)
        return buckets

    def unpack_gradients(
        self, buckets: tuple[Tensor, ...], like: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Buckets -> gradients in the shapes of `like`."""
        gradients = ()
        for bucket, (start, stop), starts in zip(buckets, self.bounds, self.offsets):
            gradients += unpack(bucket, starts, like[start:stop])
        return gradients

    def all_reduce(self, buckets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Buckets of this device -> their sums over all devices, a message for each."""
        sums = ()
        for bucket in buckets:
            sums += (self.reduce(bucket),)
        return sums
