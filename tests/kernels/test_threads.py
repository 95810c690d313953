"""The pool of threads of the compiled operators, called without MindSpore."""

import ctypes
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from src.kernels.library import set_threads

ROWS, CHANNELS = 4000, 96


@pytest.fixture
def kernels(built):
    """The library; its number of threads is the default again afterwards."""
    yield ctypes.CDLL(str(built))
    set_threads(None)


def call(function, *arrays) -> int:
    """Call an operator as MindSpore does: float32 arrays, inputs and then outputs."""
    count = len(arrays)
    data = (ctypes.c_void_p * count)(*(a.ctypes.data for a in arrays))
    ndims = (ctypes.c_int * count)(*(a.ndim for a in arrays))
    shapes = [(ctypes.c_int64 * max(a.ndim, 1))(*a.shape) for a in arrays]
    pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(shape) for shape in shapes))
    return function(count, data, ndims, pointers, None, None, None)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def gradients(kernels) -> bytes:
    """Of a LayerNorm over many blocks of rows."""
    x, dy, gamma = normal(ROWS, CHANNELS), normal(ROWS, CHANNELS, seed=1), normal(CHANNELS)
    mean, inverse = x.mean(1), 1 / x.std(1)
    dx, dgamma, dbeta = np.empty_like(x), np.empty_like(gamma), np.empty_like(gamma)
    assert not call(kernels.layer_norm_grad, dy, x, gamma, mean, inverse, dx, dgamma, dbeta)
    return b"".join(each.tobytes() for each in (dx, dgamma, dbeta))


def pool_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_results_do_not_depend_on_the_number_of_threads(kernels):
    found = set()
    for threads in (1, 2, 3, 8):
        kernels.cvt_set_threads(threads)
        found.add(gradients(kernels))
    assert len(found) == 1


def test_the_number_of_threads_is_kept_to(kernels):
    """In a process of its own, where no other test has started threads."""
    code = (
        "import ctypes, sys; from tests.kernels.test_threads import gradients, pool_threads\n"
        "kernels = ctypes.CDLL(sys.argv[1]); before = pool_threads(); seen = []\n"
        "for threads in (1, 4, 2):\n"
        "    kernels.cvt_set_threads(threads); gradients(kernels)\n"
        "    seen.append((kernels.cvt_threads(), pool_threads() - before))\n"
        "print(seen)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, kernels._name], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "[(1, 0), (4, 3), (2, 3)]\n"
    assert kernels.cvt_set_threads(0) == kernels.cvt_set_threads(-1) == 1


@pytest.mark.parametrize("asked", [None, "1"])
def test_the_default_is_the_number_of_cores_or_the_users(built, asked):
    """`import mindspore` sets OMP_NUM_THREADS to 1 unless the user set it; that is no wish."""
    code = (
        "import mindspore, sys; from pathlib import Path; from src.kernels import library\n"
        "path = library.library(Path(sys.argv[1])); print(library._loaded[path].cvt_threads())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("OMP_NUM_THREADS", None)
    if asked is not None:
        environment["OMP_NUM_THREADS"] = asked
    done = subprocess.run(
        [sys.executable, "-c", code, str(built.parent)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert int(done.stdout) == int(asked or len(os.sched_getaffinity(0)))


def test_the_users_number_is_taken(kernels, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "3")
        set_threads(None)
    assert kernels.cvt_threads() == 3


def test_several_callers_at_once(kernels):
    kernels.cvt_set_threads(3)
    expected, wrong = gradients(kernels), []

    def work():
        wrong.extend(1 for _ in range(20) if gradients(kernels) != expected)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert not wrong


def test_after_a_fork(kernels):
    """The child has none of the pool's threads and must not wait for them."""
    kernels.cvt_set_threads(4)
    expected = gradients(kernels)
    child = os.fork()
    if not child:
        before = pool_threads()
        right = gradients(kernels) == expected and pool_threads() - before == 3
        os._exit(0 if right else 1)
    deadline = threading.Timer(30, os.kill, (child, 9))
    deadline.start()
    assert os.waitpid(child, 0)[1] == 0
    deadline.cancel()
    assert gradients(kernels) == expected


def test_idle_threads_take_no_time(kernels):
    """Spinning ones would take the cores from MindSpore's own kernels."""
    kernels.cvt_set_threads(4)
    gradients(kernels)
    done, before = threading.Event(), sum(os.times()[:2])
    done.wait(0.5)
    assert sum(os.times()[:2]) - before < 0.2


def zeros(*shapes):
    return [np.zeros(shape, np.float32) for shape in shapes]


GRID, SIZES, STRIDE = (4, 5), (3, 2, 2), (2,)
KEYS = [(2, 3, 8)] * 2
# LayerNorm's gamma and beta, three weights, gammas, betas; what comes of them
PROJECTIONS = [(8,), (8,), *[(8, 1, 3, 3)] * 3, *[(8,)] * 6]
PROJECTED = [(2, 21, 8), (2, 7, 8), (2, 7, 8)]
BRANCH = [
    *[(2, 5, 32)] * 2, *[(2, 3, 32)] * 2, *[(32, 32)] * 4, *[(32,)] * 4, (2,), (1,), (2,)
]  # fmt: skip
MLP = [(2, 5, 8), (8,), (8,), (12, 8), (12,), (8, 12), (8,), (2,), (1,)]
EMBED = [(8, 3, 3, 3), (8,), (8,)]
SHAPES = {
    "layer_norm": [(6, 8), (8,), (8,), (1,), (6, 8), (6,), (6,)],
    "layer_norm_grad": [(6, 8), (6, 8), (8,), (6,), (6,), (6, 8), (8,), (8,)],
    "bias_quick_gelu": [(6, 8), (8,), (6, 8)],
    "bias_gelu_grad": [(6, 8), (6, 8), (8,), (6, 8), (8,)],
    "bias_residual": [(2, 5, 8), (2, 5, 8), (8,), (2,), (2, 5, 8)],
    "bias_residual_grad": [(2, 5, 8), (2,), (2, 5, 8), (8,)],
    "attention": [(2, 5, 8), *KEYS, (8,), (8,), (8,), (1,), (4,), (2, 5, 8)],
    "attention_grad": [
        *[(2, 5, 8)] * 2, *KEYS, (8,), (8,), (8,), (1,), (4,), (2, 5, 8), *KEYS, (8,), (8,), (8,)
    ],
    "projections": [(2, 21, 8), *PROJECTIONS, *[(8,)] * 6, (2,), STRIDE, GRID, *PROJECTED],
    "batch_projections": [
        (2, 21, 8), *PROJECTIONS, *[(8,)] * 6, (2,), (3,), STRIDE, GRID, *PROJECTED, *[(8,)] * 6
    ],
    "batch_projections_grad": [
        *PROJECTED, (2, 21, 8), *PROJECTIONS, *[(8,)] * 3, (2,), (3,), STRIDE, GRID,
        (2, 21, 8), *PROJECTIONS
    ],
    "attention_branch": [*BRANCH, (2, 5, 32)],
    "attention_branch_grad": [
        (2, 5, 32), *BRANCH, (2, 5, 32), *[(2, 3, 32)] * 2, *[(32, 32)] * 4, *[(32,)] * 4
    ],
    "mlp_gelu": [*MLP, (2, 5, 8)],
    "mlp_quick_gelu_grad": [(2, 5, 8), *MLP, *MLP[:7]],
    "conv_embed": [(2, 20, 3), *EMBED, (8,), (1,), SIZES, GRID, (2, 6, 8), (2, 6, 8)],
    "conv_embed_grad": [
        (2, 6, 8), (2, 6, 8), (2, 20, 3), (8, 3, 3, 3), (8,), (1,), SIZES, GRID,
        (2, 6, 8), *EMBED, (8,)
    ],
    "conv_embed_grad_x": [(2, 6, 8), (2, 20, 3), (8, 3, 3, 3), SIZES, GRID, (2, 20, 3)],
    "unfold": [(2, 20, 3), SIZES, GRID, (12, 27)],
    "unfold_grad": [(12, 27), SIZES, GRID, (2, 20, 3), (2, 20, 3)],
    "running_statistics": [*[(8,)] * 6, (3,), (3,), *[(8,)] * 6, (1,)],
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_belong_together_are_refused(kernels, name):
    """Each tensor in turn one longer, one dimension fewer, or missing: never read or written."""
    operator, shapes = getattr(kernels, name), SHAPES[name]
    assert call(operator, *zeros(*shapes)) == 0
    assert call(operator, *zeros(*shapes[:-1])) == 1
    for i, shape in enumerate(shapes):
        for axis in range(len(shape)):
            wrong = (*shape[:axis], shape[axis] + 7, *shape[axis + 1 :])
            arrays = zeros(*shapes[:i], wrong, *shapes[i + 1 :])
            assert call(operator, *arrays) == 1, (i, wrong)
