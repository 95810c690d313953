"""Comparison of compiled operators with MindSpore's own."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops


def compare(compiled, plain, *inputs, tolerance=2e-6, least=0.3):
    """Results, and gradients of a weighted sum of them, relative to the largest or to `least`.

    The gradient of the keys' bias is 0 up to the rounding of the others.
    """
    rng = np.random.default_rng(7)
    inputs = [Tensor(array) for array in inputs]
    expected = plain(*inputs)
    weights = Tensor(rng.standard_normal(expected.shape).astype(np.float32))
    pairs = [(compiled(*inputs), expected)]
    positions = tuple(range(len(inputs)))

    def of_compiled(*inputs):
        return (compiled(*inputs) * weights).sum()

    def of_plain(*inputs):
        return (plain(*inputs) * weights).sum()

    found, wanted = (ms.grad(each, positions)(*inputs) for each in (of_compiled, of_plain))
    if len(inputs) == 1:
        found, wanted = [found], [wanted]
    for one, other in (*pairs, *zip(found, wanted)):
        one, other = one.asnumpy(), other.asnumpy()
        assert one.shape == other.shape
        assert abs(one - other).max() <= tolerance * max(abs(other).max(), least)


def normal(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return rng.standard_normal(shape).astype(np.float32)


def softmax(x):
    """ops.softmax is no reference: behind one column its gradient is wrong in PyNative (2.8.0)."""
    exponentials = ops.exp(x)
    return exponentials / exponentials.sum(-1, keepdims=True)


def plain_attention(heads, scale):
    def split(x):
        return x.reshape((*x.shape[:2], heads, -1)).transpose((0, 2, 1, 3))

    def run(q, k, v, of_q, of_k, of_v):
        scores = ops.matmul(split(q + of_q), split(k + of_k).transpose((0, 1, 3, 2)))
        y = ops.matmul(softmax(scale * scores), split(v + of_v))
        return y.transpose((0, 2, 1, 3)).reshape(q.shape)

    return run
