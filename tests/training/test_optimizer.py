"""AdamW against its definition in numpy, and what decays."""

import mindspore as ms
import numpy as np

from src.models import create_model
from src.training.optimizer import SGD, AdamW, is_decayed
from tests.conftest import TINY


def test_updates_equal_the_definition():
    """Twelve steps with a changing rate; float64 numpy, PyTorch's place of epsilon."""
    rng = np.random.default_rng(0)
    values = {"a.weight": rng.standard_normal((3, 4)), "a.bias": rng.standard_normal(4)}
    parameters = [ms.Parameter(ms.Tensor(v, ms.float32), name=n) for n, v in values.items()]
    beta1, beta2, eps, decay = 0.8, 0.95, 1e-3, 0.3
    optimizer = AdamW(parameters, (beta1, beta2), eps, decay)
    m = {n: np.zeros_like(v) for n, v in values.items()}
    v = {n: np.zeros_like(v) for n, v in values.items()}
    for t in range(1, 13):
        lr = 0.1 / t
        gradients = {n: rng.standard_normal(x.shape) * 10.0 ** rng.integers(-4, 1)
                     for n, x in values.items()}  # fmt: skip
        for n, g in gradients.items():
            values[n] = values[n] * (1 - lr * (decay if n.endswith("weight") else 0))
            m[n] = beta1 * m[n] + (1 - beta1) * g
            v[n] = beta2 * v[n] + (1 - beta2) * g**2
            root = np.sqrt(v[n] / (1 - beta2**t)) + eps
            values[n] = values[n] - lr * m[n] / (1 - beta1**t) / root
        tensors = tuple(ms.Tensor(g, ms.float32) for g in gradients.values())
        optimizer(tensors, ms.Tensor(lr, ms.float32), ms.Tensor(t, ms.int32), ms.Tensor(True))
    for parameter in parameters:
        np.testing.assert_allclose(
            parameter.asnumpy(), values[parameter.name], rtol=2e-5, atol=1e-6
        )


def test_only_weights_of_linears_and_convolutions_decay():
    net = create_model("cvt_nano", **TINY, pos_embed=True, image_size=32)
    decayed = {p.name for p in net.trainable_params() if is_decayed(p)}
    cells = dict(net.cells_and_names())
    expected = {
        f"{name}.weight"
        for name, cell in cells.items()
        if isinstance(cell, (ms.nn.Dense, ms.nn.Conv2d))
    }
    assert decayed == expected
    optimizer = AdamW(net.trainable_params())
    assert {p.name for p, on in zip(optimizer.parameters, optimizer.decayed) if on} == expected


def test_momentum_descent_equals_the_definition():
    rng = np.random.default_rng(0)
    values = {"a.weight": rng.standard_normal((3, 4)), "a.bias": rng.standard_normal(4)}
    parameters = [ms.Parameter(ms.Tensor(v, ms.float32), name=n) for n, v in values.items()]
    optimizer = SGD(parameters, momentum=0.7, weight_decay=0.2)
    velocity = dict.fromkeys(values, 0.0)
    for t in range(1, 6):
        lr = 0.1 / t
        gradients = {n: rng.standard_normal(v.shape) for n, v in values.items()}
        for n, g in gradients.items():
            decay = 0.2 if n.endswith("weight") else 0.0
            velocity[n] = 0.7 * velocity[n] + g + decay * values[n]
            values[n] = values[n] - lr * velocity[n]
        tensors = tuple(ms.Tensor(g, ms.float32) for g in gradients.values())
        optimizer(tensors, ms.Tensor(lr, ms.float32), ms.Tensor(t, ms.int32), ms.Tensor(True))
    for parameter in parameters:
        np.testing.assert_allclose(parameter.asnumpy(), values[parameter.name], rtol=1e-5)
