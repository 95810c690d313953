"""The step against the official training trajectory, and its parts against numpy."""

import zlib

import mindspore as ms
import numpy as np
import pytest

from src.models import create_model
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import AdamW
from src.training.train_step import TrainStep
from tests.conftest import TINY
from tests.golden import official

TRAJECTORY = official.DESCRIPTION["trajectories"][0]
# Softmax ignores a shift of all keys: the true gradient is zero, and Adam follows rounding noise.
WITHOUT_GRADIENT = ("proj_k.bias", "conv_proj_k.bn.bias")


@pytest.fixture
def pynative_mode(graph_mode):
    """For what does not depend on the mode: nothing to compile."""
    ms.set_context(mode=ms.PYNATIVE_MODE)


def batches(count, size=8, image=64, classes=10, seed=0):
    rng = np.random.default_rng([seed, zlib.crc32(b"data")])
    for _ in range(count):
        images = rng.standard_normal((size, 3, image, image)).astype(np.float32)
        labels = rng.integers(0, classes, size).astype(np.int32)
        yield ms.Tensor(images), ms.Tensor(labels)


def tiny_step(net=None, lr=1e-3, **options):
    net = net or create_model("cvt_nano", **TINY)
    loss = LabelSmoothingCrossEntropy(0.1)
    optimizer = AdamW(net.trainable_params())
    step = TrainStep(net, loss, optimizer, np.full(50, lr, np.float32), **options)
    return step.set_train(True)


def weights(net):
    return {p.name: p.asnumpy().copy() for p in net.get_parameters()}


def copy_into(net, values):
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(values[parameter.name]))
    return net


def test_twenty_steps_follow_the_official_trajectory():
    """Loss and gradient norm of each step; norms of weights and running statistics at the end."""
    net = official.model(TRAJECTORY)
    net.set_train(True)
    optimizer = AdamW(
        net.trainable_params(),
        tuple(TRAJECTORY["betas"]),
        TRAJECTORY["eps"],
        TRAJECTORY["weight_decay"],
    )
    rates = np.full(20, TRAJECTORY["lr"], np.float32)
    loss = LabelSmoothingCrossEntropy(TRAJECTORY["label_smoothing"])
    step = TrainStep(net, loss, optimizer, rates).set_train(True)
    found = [[float(x.asnumpy()) for x in step(*batch)] for batch in batches(20)]
    for kind, column in (("loss", 0), ("grad_norm", 1)):
        expected = official.REFERENCE[f"{TRAJECTORY['tag']}/{kind}"]
        np.testing.assert_allclose([row[column] for row in found], expected, rtol=1e-5)
    norms = TRAJECTORY["param_l2_norm_after"]
    checked = 0
    for parameter in net.get_parameters():
        name = official.official_name(parameter.name)
        if not name.endswith(WITHOUT_GRADIENT):
            norm = np.linalg.norm(parameter.asnumpy().astype(np.float64))
            assert norm == pytest.approx(norms[name], rel=1e-4), name
            checked += 1
    assert checked > 100


def test_clipping_bounds_the_update_as_pytorch_does(pynative_mode):
    """A large bound changes nothing; a small one equals the gradients scaled by bound / norm."""
    batch = next(batches(1, image=32))
    net = create_model("cvt_nano", **TINY)
    start = weights(net)
    norm = float(tiny_step(net)(*batch)[1].asnumpy())
    moments = {}
    for bound in (0.0, 2 * norm, norm / 4):
        step = tiny_step(copy_into(create_model("cvt_nano", **TINY), start), clip_norm=bound)
        assert float(step(*batch)[1].asnumpy()) == pytest.approx(norm, rel=1e-6)
        moments[bound] = np.concatenate([m.asnumpy().ravel() for m in step.optimizer.moment1])
    assert np.array_equal(moments[0.0], moments[2 * norm])
    np.testing.assert_allclose(moments[norm / 4], moments[0.0] / 4, rtol=1e-4, atol=1e-9)


def test_the_loss_scale_cancels_out(pynative_mode):
    batch = next(batches(1, image=32))
    net = create_model("cvt_nano", **TINY)
    start = weights(net)
    plain = tiny_step(net)
    scaled = tiny_step(copy_into(create_model("cvt_nano", **TINY), start), loss_scale=1024.0)
    for expected, found in zip(plain(*batch), scaled(*batch)):
        assert float(found.asnumpy()) == pytest.approx(float(expected.asnumpy()), rel=1e-5)
    for expected, found in zip(plain.optimizer.moment1, scaled.optimizer.moment1):
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-3, atol=1e-7)


def test_the_average_follows_the_weights_and_their_statistics():
    net, ema_net = (create_model("cvt_nano", **TINY) for _ in range(2))
    copy_into(ema_net, weights(net))
    expected = {f"ema.{name}": value for name, value in weights(net).items()}
    ema_net.update_parameters_name("ema.")
    ema_net.set_train(False)
    step = tiny_step(net, ema_net=ema_net, ema_decay=0.15)
    for t, batch in enumerate(batches(3, image=32)):
        step(*batch)
        decay = min(0.15, (1 + t) / (10 + t))
        for name, value in weights(net).items():
            expected[f"ema.{name}"] = decay * expected[f"ema.{name}"] + (1 - decay) * value
    for name, value in weights(ema_net).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-7)
    assert "ema.stage0.blocks.0.attn.conv_proj_q.bn.moving_mean" in expected


def test_randomness_follows_seed_and_step_only():
    """The same steps again give the same losses to the last bit; another seed gives others."""
    options = {**TINY, "drop_path_rate": 0.5}
    start = weights(create_model("cvt_nano", **options))
    losses = {}
    for run, seed in (("first", 1), ("again", 1), ("other", 2)):
        ms.set_seed(len(losses))  # the global generator has no say
        step = tiny_step(copy_into(create_model("cvt_nano", **options), start), seed=seed)
        losses[run] = [float(step(*batch)[0].asnumpy()) for batch in batches(3, image=32)]
    assert losses["first"] == losses["again"]
    assert losses["first"] != losses["other"]


def test_the_learning_rate_is_that_of_the_step(pynative_mode):
    """Rate zero in the second of three steps: the weights stand still in that step only."""
    net = create_model("cvt_nano", **TINY)
    optimizer = AdamW(net.trainable_params())
    rates = np.array([1e-3, 0, 1e-3], np.float32)
    step = TrainStep(net, LabelSmoothingCrossEntropy(0.1), optimizer, rates).set_train(True)
    moved = []
    for batch in batches(3, image=32):
        before = net.head.weight.asnumpy().copy()
        step(*batch)
        moved.append(not np.array_equal(before, net.head.weight.asnumpy()))
    assert moved == [True, False, True]
    assert int(step.step.asnumpy()) == 3
