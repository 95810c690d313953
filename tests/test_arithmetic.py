"""What is asked of Ascend and GPUs, by stand-ins; the probes on this CPU and on broken devices."""

import dataclasses
import os
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest

from src import arithmetic
from src.arithmetic import (
    check_arithmetic,
    configure_arithmetic,
    keep_float32,
    require_precision,
)
from src.config import Config, RuntimeConfig
from src.errors import UserError
from tests.conftest import ROOT


class Switches:
    """In the place of MindSpore's op_precision, which needs the device."""

    def __init__(self, asked):
        self.asked = asked

    def __getattr__(self, name):
        return lambda value: self.asked.update({name: value})


@pytest.fixture
def asked(monkeypatch):
    from mindspore.device_context import ascend, gpu

    asked = {}
    for owner in (ascend, gpu):
        monkeypatch.setattr(owner, "op_precision", Switches(asked))
    return asked


@pytest.mark.parametrize(
    ("device", "keys", "right"),
    [
        ("Ascend", {}, {"conv_allow_hf32": False, "matmul_allow_hf32": False}),
        ("Ascend", {"precision": "float16"}, {}),
        ("GPU", {}, {"conv_allow_tf32": False, "matmul_allow_tf32": False}),
        ("GPU", {"precision": "float16"}, {}),
        ("CPU", {}, {}),
    ],
)
def test_float32_is_asked_to_be_float32(asked, device, keys, right):
    configure_arithmetic(RuntimeConfig(**keys), device)
    assert asked == right


def test_the_precision_that_a_script_has_set_stays(asked, monkeypatch):
    def refuse(value):
        raise RuntimeError("The 'conv_allow_hf32' can not be set repeatedly.")

    monkeypatch.setattr(ms.device_context.ascend.op_precision, "conv_allow_hf32", refuse, False)
    keep_float32("Ascend")
    assert asked == {"matmul_allow_hf32": False}


@pytest.mark.parametrize(("device", "told"), [("CPU", False), ("Ascend", False), ("GPU", True)])
def test_deterministic_is_told_to_differ_on_a_gpu(asked, monkeypatch, caplog, device, told):
    monkeypatch.setattr(ms, "set_deterministic", lambda value: None)
    configure_arithmetic(RuntimeConfig(deterministic=True), device)
    assert ("runtime.deterministic true: on a GPU" in caplog.text) is told


@pytest.mark.parametrize(
    ("device", "message"),
    [("CPU", "for the CPU; use float32"), ("GPU", "for the GPU; use float16 or float32")],
)
def test_bfloat16_where_it_has_no_kernels(device, message):
    with pytest.raises(UserError, match=f"precision bfloat16: .* {message}"):
        require_precision("bfloat16", device)
    require_precision("bfloat16", "Ascend")
    require_precision("float16", device)


def test_deterministic_is_set_once_and_may_be_asked_for_again(monkeypatch):
    calls = []

    def set_deterministic(value):
        calls.append(value)
        if len(calls) > 1:
            raise RuntimeError("The 'mindspore.set_deterministic' can not be set repeatedly.")

    monkeypatch.setattr(ms, "set_deterministic", set_deterministic)
    for runtime in (RuntimeConfig(), *[RuntimeConfig(deterministic=True)] * 2):
        configure_arithmetic(runtime, "CPU")
    assert calls == [True, True]


@pytest.mark.parametrize(
    ("keys", "device", "message"),
    [
        ({"jit_level": "O2"}, "CPU", "O2: is Ascend's graph engine, this runs on CPU"),
        ({"jit_level": "O1", "mode": "pynative"}, "CPU", "set runtime.mode graph"),
    ],
)
def test_a_level_without_effect_is_refused(keys, device, message):
    with pytest.raises(UserError, match=message):
        configure_arithmetic(RuntimeConfig(**keys), device)


def test_a_level_that_mindspore_does_not_know_is_told(monkeypatch):
    def set_context(**kwargs):
        raise ValueError("the keyword argument jit_config is not recognized!")

    monkeypatch.setattr(ms, "set_context", set_context)
    with pytest.raises(UserError, match=r"jit_level O1: MindSpore 2\..* rejects it .*jit_config"):
        configure_arithmetic(RuntimeConfig(jit_level="O1"), "CPU")


def config_of(**keys):
    config = Config()
    for group, values in keys.items():
        changed = dataclasses.replace(getattr(config, group), **values)
        config = dataclasses.replace(config, **{group: changed})
    return config


def test_this_cpu_computes_as_training_needs_it(caplog):
    check_arithmetic(
        config_of(training={"loss_scale": "dynamic"}, model={"drop_path_rate": [0, 0.1]})
    )
    assert not caplog.records


def test_a_device_that_saturates_takes_no_dynamic_scale(monkeypatch):
    monkeypatch.setattr(ms.ops, "isfinite", lambda x: ms.Tensor(np.ones(x.shape, bool)))
    with pytest.raises(UserError, match="loss_scale dynamic: .*set training.loss_scale 1024"):
        check_arithmetic(config_of(training={"loss_scale": "dynamic"}))
    check_arithmetic(config_of(training={"loss_scale": 1024.0}))


@pytest.mark.parametrize("rates", [{"drop_path_rate": 0.1}, {"drop_rate": 0.1}])
def test_a_device_whose_int32_saturates_takes_no_drop_path(monkeypatch, rates):
    def saturating(x, factor):
        product = x.asnumpy().astype(np.int64) * factor
        return ms.Tensor(np.clip(product, -(2**31), 2**31 - 1).astype(np.int32))

    monkeypatch.setattr("src.models.stochastic._multiply", saturating)
    with pytest.raises(UserError, match="does not multiply int32 modulo"):
        check_arithmetic(config_of(model=rates))
    check_arithmetic(config_of())


def test_a_device_without_float32_products_is_told(monkeypatch, caplog):
    def half(a, b):
        return ms.Tensor((a.asnumpy().astype(np.float16) @ b.asnumpy()).astype(np.float32))

    monkeypatch.setattr(ms.ops, "matmul", half)
    check_arithmetic(config_of())
    assert "lower precision" in caplog.text
    assert not arithmetic.multiplies_in_float32()


LOSSES = """
import sys
from src.device import prepare_environment, setup
prepare_environment()
from src.config import RuntimeConfig
setup(RuntimeConfig(jit_level=sys.argv[1]))
import mindspore as ms
from tests.training.test_train_step import batches, tiny_step
from src.models import create_model
sizes = {"image_size": 32, "embed_dim": 8, "num_heads": 1, "depth": 1, "num_classes": 10}
step = tiny_step(create_model("vit_nano_8", **sizes), clip_norm=1.0)  # compiles faster than a CvT
print("level", ms.get_context("jit_config")["jit_level"])
print("losses", [float(step(*batch)[0].asnumpy()) for batch in batches(4, image=32)])
"""


def test_both_levels_of_the_cpu_give_equal_losses(tmp_path):
    """In processes of their own: a level stays set."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    losses = []
    for level in ("O0", "O1"):
        command = [sys.executable, "-c", LOSSES, level]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"level {level}" in done.stdout
        losses.append(done.stdout.partition("losses ")[2])
    assert losses[0] and losses[0] == losses[1]
