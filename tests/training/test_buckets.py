"""Packing of gradients, without ranks."""

import mindspore as ms
import numpy as np
import pytest

from src.models import create_model
from src.training.buckets import BUCKET_BYTES, bucket_bounds, offsets, pack, unpack


@pytest.mark.parametrize(
    ("sizes", "bounds"),
    [
        ([5], [(0, 1)]),
        ([1, 2, 3], [(0, 3)]),
        ([2**23, 2**23, 2**23], [(0, 2), (2, 3)]),  # 32 MB each
        ([2**24, 1], [(0, 1), (1, 2)]),
        ([2**26] * 9, [(0, 3), (3, 6), (6, 9)]),  # 2.3 GB: three, not 36
        ([1, 2**28, 1], [(0, 2), (2, 3)]),
    ],
)
def test_buckets_hold_about_64_mb_and_are_three_at_most(sizes, bounds):
    assert bucket_bounds(sizes) == bounds


def test_every_published_variant_sends_three_messages_at_most():
    """CvT-13's 342 gradients are 80 MB."""
    sizes = [int(p.size) for p in create_model("cvt_13", 1000).trainable_params()]
    bounds = bucket_bounds(sizes)
    assert len(sizes) == 342 and len(bounds) == 2
    assert bounds[0][1] == bounds[1][0] and (bounds[0][0], bounds[-1][1]) == (0, 342)
    assert 0.9 * BUCKET_BYTES < 4 * sum(sizes[: bounds[0][1]]) < 1.1 * BUCKET_BYTES


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
def test_unpacked_is_what_was_packed(mode):
    ms.set_context(mode=mode)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 1, 2), (), (4,))]

    class RoundTrip(ms.nn.Cell):
        def construct(self, a, b, c):
            flat = pack((a, b, c))
            return flat, unpack(flat, offsets((6, 1, 4)), (a, b, c))

    flat, found = RoundTrip()(*map(ms.Tensor, values))
    assert np.array_equal(flat.asnumpy(), np.concatenate([v.ravel() for v in values]))
    for value, back in zip(values, found):
        assert back.shape == value.shape and np.array_equal(back.asnumpy(), value)
