"""The step against the official training trajectory, and its parts against numpy."""

import os
import re
import socket
import subprocess
import sys
import zlib

import mindspore as ms
import numpy as np
import pytest

from src.build import set_precision
from src.models import create_model
from src.models.compiled import use_compiled
from src.models.layers import BatchNorm2d
from src.training.loss import LabelSmoothingCrossEntropy
from src.training.optimizer import SGD, AdamW
from src.training.train_step import GROWTH_STEPS, TrainStep, mix_images
from tests.conftest import ROOT
from tools.check_device.golden import official

# One block, because a step treats all networks alike; the official trajectory has a CvT.
TINY = {"depths": (1,), "width": 8, "num_classes": 10}
DROPPING = {**TINY, "depths": (1, 1), "drop_path_rate": 0.5}  # the first block never drops
TRAJECTORY = official.DESCRIPTION["trajectories"][0]
# Softmax ignores a shift of all keys: the true gradient is zero, and Adam follows rounding noise.
WITHOUT_GRADIENT = ("proj_k.bias", "conv_proj_k.bn.bias")


def batches(count, size=8, image=64, classes=10, seed=0):
    rng = np.random.default_rng([seed, zlib.crc32(b"data")])
    for _ in range(count):
        images = rng.standard_normal((size, 3, image, image)).astype(np.float32)
        labels = rng.integers(0, classes, size).astype(np.int32)
        yield ms.Tensor(images), ms.Tensor(labels)


def tiny_step(net=None, lr=1e-3, **options):
    net = net or create_model("resnet_nano", **TINY)
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


def everything(step):
    return {p.name: p.asnumpy().copy() for p in step.get_parameters()}


def restore(step, values):
    """Back to `everything` of an earlier moment, without compiling anew."""
    for parameter in step.get_parameters():
        parameter.set_data(ms.Tensor(values[parameter.name]))


@pytest.mark.parametrize("operators", ["plain", "compiled"])
def test_twenty_steps_follow_the_official_trajectory(operators, request):
    """Loss and gradient norm of each step; norms of weights and running statistics at the end."""
    net = official.model(TRAJECTORY)
    library = request.getfixturevalue("built") if operators == "compiled" else None
    if library is not None:
        use_compiled(net, library)
    net.set_train(True)
    optimizer = AdamW(
        net.trainable_params(),
        tuple(TRAJECTORY["betas"]),
        TRAJECTORY["eps"],
        TRAJECTORY["weight_decay"],
    )
    rates = np.full(20, TRAJECTORY["lr"], np.float32)
    loss = LabelSmoothingCrossEntropy(TRAJECTORY["label_smoothing"])
    step = TrainStep(net, loss, optimizer, rates, library=library).set_train(True)
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
    net = create_model("resnet_nano", **TINY)
    start = weights(net)
    norm = float(tiny_step(net)(*batch)[1].asnumpy())
    moments = {}
    for bound in (0.0, 2 * norm, norm / 4):
        step = tiny_step(copy_into(create_model("resnet_nano", **TINY), start), clip_norm=bound)
        assert float(step(*batch)[1].asnumpy()) == pytest.approx(norm, rel=1e-6)
        moments[bound] = np.concatenate([m.asnumpy().ravel() for m in step.optimizer.moment1])
    assert np.array_equal(moments[0.0], moments[2 * norm])
    np.testing.assert_allclose(moments[norm / 4], moments[0.0] / 4, rtol=1e-4, atol=1e-9)


def test_the_loss_scale_cancels_out(pynative_mode):
    batch = next(batches(1, image=32))
    net = create_model("resnet_nano", **TINY)
    start = weights(net)
    plain = tiny_step(net)
    scaled = tiny_step(copy_into(create_model("resnet_nano", **TINY), start), loss_scale=1024.0)
    for expected, found in zip(plain(*batch), scaled(*batch)):
        assert float(found.asnumpy()) == pytest.approx(float(expected.asnumpy()), rel=1e-5)
    for expected, found in zip(plain.optimizer.moment1, scaled.optimizer.moment1):
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), rtol=1e-3, atol=1e-7)


def test_the_average_follows_the_weights_and_their_statistics(pynative_mode):
    net, ema_net = (create_model("resnet_nano", **TINY) for _ in range(2))
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
    assert "ema.stem.bn.moving_mean" in expected


def test_randomness_follows_seed_and_step_only():
    """The same steps again give the same losses to the last bit; another seed gives others."""
    start = weights(create_model("resnet_nano", **DROPPING))
    losses = {}
    for seed, mode in ((1, ms.GRAPH_MODE), (1, ms.PYNATIVE_MODE), (2, ms.PYNATIVE_MODE)):
        ms.set_context(mode=mode)
        step = tiny_step(copy_into(create_model("resnet_nano", **DROPPING), start), seed=seed)
        begin = everything(step)
        for run in ("first", "again"):
            ms.set_seed(len(losses))  # the global generator has no say
            restore(step, begin)
            result = [float(step(*batch)[0].asnumpy()) for batch in batches(3, image=32)]
            losses[seed, mode, run] = result
        assert losses[seed, mode, "first"] == losses[seed, mode, "again"]
    graph, operators, other = (losses[key] for key in losses if key[-1] == "first")
    np.testing.assert_allclose(graph, operators, rtol=1e-5)
    assert not np.allclose(other, operators, rtol=1e-4)


def test_the_learning_rate_is_that_of_the_step(pynative_mode):
    """Rate zero in the second of three steps: the weights stand still in that step only."""
    net = create_model("resnet_nano", **TINY)
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


@pytest.mark.parametrize("operators", ["plain", "compiled"])
@pytest.mark.parametrize("kind, mode", [(AdamW, ms.GRAPH_MODE), (SGD, ms.PYNATIVE_MODE)])
def test_a_step_that_is_not_finite_leaves_no_trace(kind, mode, operators, request):
    """Not in weights, moments, running statistics or average; the scale halves, and it counts."""
    ms.set_context(mode=mode)
    net, ema_net = (create_model("resnet_nano", **TINY) for _ in range(2))
    copy_into(ema_net, weights(net)).update_parameters_name("ema.")
    loss, rates = LabelSmoothingCrossEntropy(0.1), np.full(50, 1e-2, np.float32)
    optimizer = kind(net.trainable_params(), weight_decay=0.1)
    step = TrainStep(
        net, loss, optimizer, rates,
        clip_norm=1.0, loss_scale=None, ema_net=ema_net.set_train(False), ema_decay=0.9,
        library=request.getfixturevalue("built") if operators == "compiled" else None,
    ).set_train(True)  # fmt: skip
    start = everything(step)
    first, bad, last = batches(3, image=32)
    bad[0][1, 0, 5, 5] = float("inf")
    step(*first)
    before = everything(step)
    found = [float(x.asnumpy()) for x in step(*bad)]
    assert not np.isfinite(found).all()
    after = everything(step)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"step", "skipped", "loss_scale", "steady"}
    assert (after["step"], after["skipped"], after["steady"]) == (2, 1, 0)
    assert (before["loss_scale"], after["loss_scale"]) == (2**16, 2**15)
    assert np.isfinite([float(x.asnumpy()) for x in step(*last)]).all()

    found = weights(net)
    restore(step, start)
    for batch in (first, last):
        step(*batch)
    for name, value in weights(net).items():  # the bias correction did not count it either
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parts, mode", [(1, ms.PYNATIVE_MODE), (2, ms.GRAPH_MODE)])
def test_an_overflow_of_gradients_with_a_finite_loss_leaves_no_trace(parts, mode):
    """At a scale of 2^24 float16 gradients overflow, the loss does not; good parts go as well."""
    ms.set_context(mode=mode)
    net, ema_net = (set_precision(create_model("resnet_nano", **TINY), "float16") for _ in range(2))
    copy_into(ema_net, weights(net)).update_parameters_name("ema.")
    options = {"ema_net": ema_net.set_train(False), "ema_decay": 0.9, "accumulate": parts}
    step = tiny_step(net, loss_scale=1.0, **options)

    def take(batch, *scales):
        for part, scale in enumerate(scales):
            ms.ops.assign(step.loss_scale, ms.Tensor(scale, ms.float32))
            result = step.run_batch(*batch, part=part)
        ms.ops.assign(step.loss_scale, ms.Tensor(1.0, ms.float32))
        return [float(x.asnumpy()) for x in result]

    first, bad, last = batches(3, image=32)
    good = (1.0,) * parts
    take(first, *good)
    before = everything(step)
    loss, norm = take(bad, *good[1:], 2.0**24)
    assert np.isfinite(loss) and not np.isfinite(norm), "an overflow of the gradients alone"
    after = everything(step)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"step", "skipped"}
    assert (after["step"], after["skipped"]) == (2, 1)
    assert np.isfinite(take(last, *good)).all(), "sums of a skipped step do not stay"
    moved = "stem.bn.moving_mean"
    assert not np.array_equal(everything(step)[moved], after[moved])


def test_statistics_that_overflow_alone_keep_their_last_finite_value(pynative_mode):
    """A variance above float32's range makes the normalised images zero, so the loss is finite."""

    class Norm(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.bn = BatchNorm2d(3)
            self.head = ms.nn.Dense(3, 4)

        def construct(self, images, keys):
            return self.head(self.bn(images).mean((2, 3)))

    step = tiny_step(Norm())
    images, labels = next(batches(1, image=8, classes=4))
    images[:, 1] *= 1e25
    assert np.isfinite([float(x.asnumpy()) for x in step(images, labels)]).all()
    variance = step.net.bn.moving_variance.asnumpy()
    assert variance[1] == 1 and (variance[[0, 2]] != 1).all()


def test_the_dynamic_scale_grows_after_many_finite_steps(pynative_mode):
    step = tiny_step(loss_scale=None)
    step.growth_tracker.set_data(ms.Tensor(GROWTH_STEPS - 1, ms.int32))
    step(*next(batches(1, image=32)))
    assert float(step.loss_scale.asnumpy()) == 2**17 and int(step.growth_tracker.asnumpy()) == 0
    step(*next(batches(1, image=32)))
    assert float(step.loss_scale.asnumpy()) == 2**17 and int(step.growth_tracker.asnumpy()) == 1


@pytest.mark.parametrize("operators", ["plain", "compiled"])
def test_accumulated_parts_equal_the_large_batch(operators, request):
    """Drop path and clipping on; BatchNorm, whose statistics are each part's, in inference.

    The parts as graphs, the large batch operator by operator.
    """
    start = weights(create_model("resnet_nano", **DROPPING))
    library = request.getfixturevalue("built") if operators == "compiled" else None
    found = {}
    for parts, mode in ((1, ms.PYNATIVE_MODE), (3, ms.GRAPH_MODE)):
        ms.set_context(mode=mode)
        net = copy_into(create_model("resnet_nano", **DROPPING), start)
        step = tiny_step(net, accumulate=parts, clip_norm=0.5, seed=3, library=library)
        for _, cell in net.cells_and_names():
            if isinstance(cell, ms.nn.BatchNorm2d):
                cell.set_train(False)
        results = []
        for images, labels in batches(2, size=6, image=32):
            size = 6 // parts
            for part in range(parts):
                own = slice(part * size, (part + 1) * size)
                result = step.run_batch(images[own], labels[own], part=part)
                assert (result is None) == (part < parts - 1)
            results += [float(x.asnumpy()) for x in result]
        moments = np.concatenate([m.asnumpy().ravel() for m in step.optimizer.moment1])
        found[parts] = (results, moments)
        assert not any("sum" in p.name for p in step.get_parameters()), "nothing to save"
    np.testing.assert_allclose(found[3][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[3][1], found[1][1], rtol=1e-3, atol=1e-7)


def test_mixed_images_and_their_loss_equal_numpy(pynative_mode):
    """Cutmix with a box, against the images and the soft targets written out."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((5, 3, 16, 20)).astype(np.float32)
    for mix in ([0.8, 1, 2, 10, 3, 11], [0.3, 0.3, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]):
        share = np.full((16, 20), mix[1])
        share[mix[2] : mix[3], mix[4] : mix[5]] = 0
        expected = images * share + images[::-1] * (1 - share)
        found = mix_images(ms.Tensor(images), ms.Tensor(mix, ms.float32)).asnumpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)

    class Seen(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.weight = ms.Parameter(ms.Tensor(np.ones((), np.float32)), name="seen.weight")

        def construct(self, images, keys):
            return images.reshape((5, -1))[:, :7] * self.weight

    net, labels = Seen(), rng.integers(0, 7, 5).astype(np.int32)
    step = TrainStep(net, LabelSmoothingCrossEntropy(0.1), AdamW(net.trainable_params()),
                     np.ones(9, np.float32), mixing=True).set_train(True)  # fmt: skip
    mix = [0.3, 0.3, 0, 0, 0, 0]
    loss, _ = step.run_batch(ms.Tensor(images), ms.Tensor(labels), ms.Tensor(mix, ms.float32))
    logits = (0.3 * images + 0.7 * images[::-1]).reshape(5, -1)[:, :7].astype(np.float64)
    hard = 0.3 * np.eye(7)[labels] + 0.7 * np.eye(7)[labels[::-1]]
    soft = 0.9 * hard + 0.1 / 7
    expected = -(soft * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean()
    assert float(loss.asnumpy()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="two CPU ranks need two cores",
)
def test_ranks_stay_equal_where_their_reductions_differ(tmp_path):
    """A last bit in the norm, other on each rank, would reach the weights by the clipping."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mindspore.parallel.cluster.run", "--join=True", "--worker_num=2",
        "--local_worker_num=2", f"--master_port={port}", f"--log_dir={tmp_path}",
        str(ROOT / "tests/training/two_ranks.py"),
    ]  # fmt: skip
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    first, second = (
        re.findall(r"checksum (.*)", (tmp_path / f"worker_{rank}.log").read_text())
        for rank in (0, 1)
    )
    # Not the exit code: MindSpore's clean-up at exit crashes now and then.
    assert len(first) == 1, done.stdout + done.stderr
    assert first == second
    assert np.isfinite([float(n) for n in first[0].split()[2::2]]).all()


class Twins(ms.nn.Cell):
    """Two layers of one shape, so that pairing them wrongly raises nothing."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            setattr(self, name, ms.nn.Dense(4, 4))


def test_weights_and_their_averages_are_paired_by_name(pynative_mode):
    average = Twins("ba")
    average.update_parameters_name("ema.")
    step = tiny_step(Twins("ab"), ema_net=average, ema_decay=0.9)
    names = [parameter.name.removeprefix("ema.") for parameter in step.updates.averages]
    assert (
        names == [parameter.name for parameter in step.updates.weights] and names[0] == "a.weight"
    )
