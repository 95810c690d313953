"""Exported ONNX files in MindSpore Lite 2.0.0, whose wheels are for Python 3.7."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from src.deploy.writers import write_model
from src.device import cache_folder
from src.models import create_model
from tests.conftest import file_lock

PACKAGE = "mindspore-lite==2.0.0"
TINY = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 10}
# Name: batch, height, width, the network and its options.
CASES = {
    "nano": (2, 32, 32, "cvt_nano", {"num_classes": 10}),
    "one": (1, 32, 48, "cvt_nano", TINY),
    "five": (5, 32, 32, "cvt_nano", {**TINY, "pos_embed": True, "image_size": 32}),
    "avg": (2, 32, 32, "cvt_nano", {**TINY, "qkv_projection": "avg"}),
    "linear": (2, 32, 32, "cvt_nano", {**TINY, "qkv_projection": "linear", "cls_token": False}),
    "stride_1": (16, 32, 32, "cvt_nano", {**TINY, "kv_stride": 1}),
    "vit": (2, 32, 32, "vit_nano", {"num_classes": 10, "image_size": 32}),
    "resnet": (2, 32, 32, "resnet_nano", {"num_classes": 10}),
}


def _runs(python: str | Path) -> bool:
    """Whether an interpreter starts; a version manager's stand-in may not."""
    return subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def lite_python() -> Path:
    """A Python 3.7 that has MindSpore Lite, in an environment that is kept for later runs."""
    found = [shutil.which("python3.7"), *Path.home().glob(".pyenv/versions/3.7*/bin/python3.7")]
    base = next((each for each in found if each and _runs(each)), None)
    if base is None:
        pytest.skip("no Python 3.7, which MindSpore Lite 2.0.0 needs")
    folder = cache_folder() / "mindspore-lite-2.0.0"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    python, done = folder / "bin/python", folder / "installed"
    with file_lock(folder.parent / "mindspore-lite.lock"):
        if not done.exists():
            for command in (
                [base, "-m", "venv", "--clear", folder],
                [python, "-m", "pip", "install", "-q", PACKAGE, "numpy"],
            ):
                made = subprocess.run(command, capture_output=True, text=True)
                if made.returncode:
                    errors = [line for line in made.stderr.splitlines() if "ERROR" in line]
                    reason = errors[-1] if errors else made.stderr
                    pytest.skip(f"{PACKAGE} can't be installed: {reason}")
            done.touch()
    return python


def test_logits_equal_the_networks(lite_python, tmp_path):
    """What Lite computes wrongly it does not refuse, and it may depend on batch and threads."""
    ms.set_context(mode=ms.PYNATIVE_MODE)  # each network runs once
    rng = np.random.default_rng(0)
    expected = {}
    for name, (batch, height, width, model, options) in CASES.items():
        net = create_model(model, **options).set_train(False)
        for parameter in net.get_parameters():  # else cls token, biases and statistics are trivial
            noise = rng.uniform(0.8, 1.2, parameter.shape)
            shift = 0.1 * rng.standard_normal(parameter.shape)
            parameter.set_data(Tensor((parameter.asnumpy() * noise + shift**2).astype(np.float32)))
        images = rng.standard_normal((batch, 3, height, width)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", images)
        write_model(net, images.shape, tmp_path / f"{name}.onnx", "onnx")
        expected[name] = net(Tensor(images)).asnumpy()
    program = Path(__file__).with_name("lite_program.py")
    done = subprocess.run(
        [lite_python, program, tmp_path], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name, logits in expected.items():
        found = np.load(tmp_path / f"{name}.logits.npy")
        assert found.shape == logits.shape, name
        assert np.abs(found - logits).max() <= 5e-5 * np.abs(logits).max(), name
        assert np.ptp(logits, 0).max() > 1e-3 or len(logits) == 1, f"{name} ignores its images"
