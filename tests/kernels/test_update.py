"""The compiled updates of many tensors against MindSpore's operators, which they stand in for."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor

from src.kernels.library import set_threads
from src.kernels.update import RunningStatistics
from src.models.layers import update_running_statistic
from src.training.optimizer import SGD, AdamW
from src.training.updates import CompiledUpdates, PlainUpdates

# Nothing to compile; `tests/training/test_train_step.py` has them in a graph.
pytestmark = pytest.mark.usefixtures("pynative_mode")

# More than a piece of 16,384 elements, a scalar, and names that decay or do not.
SHAPES = {"a.weight": (130, 131), "a.bias": (131,), "b.weight": (3, 2, 1), "b.gamma": (1,)}
NO_STATISTICS = ParameterTuple([])


def values(seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]


def parameters(seed=0, prefix=""):
    named = zip(SHAPES, values(seed))
    return ParameterTuple([Parameter(Tensor(v), name=f"{prefix}{n}") for n, v in named])


def arrays(tensors):
    return [tensor.asnumpy().copy() for tensor in tensors]


def updates(built, optimizer, kind, statistics=NO_STATISTICS, pairs=()):
    if kind == "plain":
        return PlainUpdates(optimizer, statistics, pairs)
    return CompiledUpdates(built, optimizer, statistics, pairs, shared=kind == "buckets")


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
@pytest.mark.parametrize("kind", ["compiled", "buckets"])
def test_parameters_and_moments_equal_the_plain_ones(built, kind, optimizer):
    """Five steps with a factor and decay; a sixth that is not active changes no bit."""
    found = {}
    for each in ("plain", kind):
        made = optimizer(parameters(), weight_decay=0.1)
        own = updates(built, made, each)
        for step in range(6):
            gradients = tuple(map(Tensor, values(step + 1)))
            active = step < 5
            if not active:
                gradients[0][3, 4] = float("nan")
                before = arrays(made.states)
            packed = own.pack_gradients(gradients)
            norm = own.gradient_norm(packed)
            lr, time = Tensor(0.1 / (step + 1), ms.float32), Tensor(step + 1, ms.int32)
            own.optimize(packed, Tensor(0.3, ms.float32), lr, time, Tensor(active))
            if active:
                expected = np.sqrt(sum((v.astype(np.float64) ** 2).sum() for v in values(step + 1)))
                assert float(norm.asnumpy()) == pytest.approx(expected, rel=1e-6)
        assert not np.isfinite(float(norm.asnumpy()))
        after = arrays(made.states)
        assert all(np.array_equal(a, b) for a, b in zip(before, after))
        found[each] = after
    for one, other in zip(found["plain"], found[kind]):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads(built):
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        optimizer = AdamW(parameters(), weight_decay=0.1)
        own = updates(built, optimizer, "compiled")
        gradients = tuple(map(Tensor, values(1)))
        norm = own.gradient_norm(gradients)
        one = Tensor(1, ms.int32)
        own.optimize(gradients, norm, Tensor(0.1, ms.float32), one, Tensor(True))
        found.append(arrays([norm, *optimizer.states]))
    set_threads(None)
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("decay", [0.75, 1.0])
def test_averages_equal_the_plain_ones(built, decay):
    found = []
    for kind in ("plain", "compiled"):
        weights, averages = parameters(), parameters(1, "ema.")
        pairs = list(zip(weights, averages))
        updates(built, SGD(weights), kind, pairs=pairs).average(Tensor(decay, ms.float32))
        found.append(arrays(averages))
        assert all(np.array_equal(a, b) for a, b in zip(arrays(weights), values(0)))
    for one, other, start in zip(*found, values(1)):
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-7)
        assert np.array_equal(other, start) == (decay == 1.0)


def test_sums_of_parts_start_anew_whatever_is_left_in_them(built):
    for kind in ("plain", "compiled", "buckets"):
        own = updates(built, SGD(parameters()), kind)
        left = [np.full(shape, np.nan, np.float32) for shape in own.packed_shapes]
        sums = ParameterTuple([Parameter(Tensor(v), name=f"s{i}") for i, v in enumerate(left)])
        for part in range(3):
            packed = own.pack_gradients(tuple(map(Tensor, values(part))))
            own.accumulate(Tensor(float(part > 0), ms.float32), sums, packed)
        flat = np.concatenate([total.ravel() for total in arrays(sums)])
        expected = np.concatenate([sum(all_).ravel() for all_ in zip(*map(values, range(3)))])
        np.testing.assert_allclose(flat[: expected.size], expected, rtol=1e-5, atol=1e-6)
        assert not flat[expected.size :].any()


@pytest.mark.parametrize("kind", ["plain", "compiled"])
def test_statistics_stay_finite(built, kind):
    """Those of the step where it is finite, single ones that are not keep their value before."""
    statistics = parameters()
    own = updates(built, SGD(parameters(3)), kind, statistics=statistics)
    before = own.copy_statistics()
    after = before.asnumpy() + 1
    after[[7, -1]] = np.inf, np.nan
    own.keep_finite_statistics(Tensor(False), before, Tensor(after))
    assert all(np.array_equal(a, b) for a, b in zip(arrays(statistics), values(0)))
    own.keep_finite_statistics(Tensor(True), before, Tensor(after))
    expected = np.where(np.isfinite(after), after, before.asnumpy())
    assert np.array_equal(np.concatenate([v.ravel() for v in arrays(statistics)]), expected)


def test_running_statistics_have_the_bits_of_the_plain_ones(built):
    """So the networks of earlier versions can be trained again to the last digit."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 77)).astype(np.float32)
    start = rng.standard_normal(77).astype(np.float32)
    momentum, corrections = 1 - 0.9, [640 / 639, 160 / 159, 1.0]
    found = []
    for kind in ("plain", "compiled"):
        running = [Parameter(Tensor(start + i), name=f"{kind}{i}") for i in range(6)]
        if kind == "plain":
            for i in (0, 2, 3, 5):
                correction = corrections[i - 3] if i >= 3 else 1.0
                update_running_statistic(running[i], Tensor(values[i]) * correction, momentum)
        else:
            momenta = Tensor([momentum, 0.0, momentum], ms.float32)  # keys stand still
            RunningStatistics(built)(
                tuple(map(Tensor, values)), tuple(running), momenta, Tensor(corrections, ms.float32)
            )
        found.append(arrays(running))
    assert all(np.array_equal(one, other) for one, other in zip(*found))
    expected = 0.9 * start + 0.1 * values[0]
    np.testing.assert_allclose(found[1][0], expected, rtol=1e-5, atol=1e-6)
