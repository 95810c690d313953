"""convert.py, and what recognises a published variant."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from src.config import Config, ModelConfig
from src.deploy import convert as conversion
from src.errors import UserError
from src.models import create_model, list_models
from src.models.cvt import CvT
from src.weights import load_weights, save_checkpoint, save_weights
from src.weights.names import to_ours
from tests.conftest import TINY, run_command
from tests.golden import pico
from tools.check_device.golden import official

MALICIOUS = Path(__file__).parents[1] / "weights/data/malicious.pth"
SOURCE = pico.FOLDER / "pico_hf.bin"


@pytest.fixture
def config() -> Config:
    sizes = {name: list(value) for name, value in pico.SIZES.items()}
    return Config(model=ModelConfig(name="cvt_13", image_size=64, **sizes))


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "pico.yaml"
    path.write_text(pico.RECIPE)
    return str(path)


def test_command(tmp_path, recipe):
    words = ("--src", str(SOURCE), "--config", recipe, "--verify", "--dst")
    done = run_command("convert.py", *words, "new/pico.ckpt", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    target = tmp_path / "new/pico.ckpt"
    assert len([line for line in lines if line.startswith("loaded ")]) == 203
    assert len([line for line in lines if line.startswith("left ")]) == 18
    assert ["loaded", "head.bias", "[10]", "[10]", "classifier.bias"] in map(str.split, lines)
    assert "203 tensors loaded" in done.stdout and "Hugging Face names, 203 renamed" in done.stdout
    assert "verified: all 203 tensors of the result equal the source's" in lines
    assert f"--config {recipe} " in lines[-1], "the recipe that was given"
    for path in (SOURCE, target):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in done.stdout
    assert [path.name for path in target.parent.iterdir()] == ["pico.ckpt"]
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = pico.model()
    load_weights(net, target)
    assert np.abs(net(pico.images()).asnumpy() - pico.LOGITS).max() <= 2e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--src", SOURCE, "--dst", "x.pth"], "--dst x.pth: the name must end in .ckpt or"),
        (
            ["--src", SOURCE, "--dst", "old.ckpt"],
            "--dst old.ckpt: exists and is not an earlier",
        ),
        (["--src", SOURCE, "--dst", SOURCE, "--force"], "the name must end in"),
        (["--src", SOURCE, "--dst", "old.ckpt/x.ckpt"], "old.ckpt is not a folder"),
        (
            ["--src", SOURCE, "--dst", "x.ckpt", "--entry", "ema"],
            "no weights under --entry ema",
        ),
        (["--src", SOURCE, "--dst", "x.ckpt", "--runtime.precision", "float16"], "has no effect"),
        (
            ["--src", SOURCE, "--dst", "x.ckpt", "--runtime.compiled_ops=never"],
            "compiled_ops=never: has",
        ),
        (
            ["--src", SOURCE, "--dst", "x.ckpt", "--model", "cvt_13", "--config", "r"],
            "give only one",
        ),
        (["--src", "nowhere.pth", "--dst", "x.ckpt"], "nowhere.pth: there is no such file"),
        (
            ["--src", "old.ckpt", "--dst", "x.ckpt"],
            "old.ckpt: not a MindSpore",
        ),
        (["--src", SOURCE, "--dst", "x.ckpt", "--model", "cvt_14"], "did you mean cvt_"),
        (["--src", MALICIOUS, "--dst", "x.ckpt"], "the pickle requests posix.system"),
        (["--src", SOURCE, "--dst", "x.ckpt"], "give --config with the model's keys"),
    ],
)
def test_refusals_leave_nothing(tmp_path, run_here, words, message):
    (tmp_path / "old.ckpt").write_text("something else")
    done = run_here("convert.py", *map(str, words))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]
    assert (tmp_path / "old.ckpt").read_text() == "something else"


def test_to_safetensors_and_back_is_exact(tmp_path, config):
    paths = [tmp_path / name for name in ("a.ckpt", "b.safetensors", "c.ckpt")]
    for source, target in zip([SOURCE, *paths], paths):
        conversion.convert(source, target, None, config, verify=False)
    assert paths[0].read_bytes() == paths[2].read_bytes()


def test_another_result_is_not_kept(tmp_path, config, monkeypatch):
    def save_another(net, path):
        weights = {parameter.name: parameter for parameter in net.get_parameters()}
        save_weights({**weights, "head.bias": Tensor(np.zeros(10, np.float32))}, path)

    monkeypatch.setattr(conversion, "save_weights", save_another)
    (tmp_path / "x.ckpt").write_text("as it was")
    with pytest.raises(UserError, match="the written head.bias differs .*: not kept"):
        conversion.convert(SOURCE, tmp_path / "x.ckpt", None, config, verify=True, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
    assert (tmp_path / "x.ckpt").read_text() == "as it was"


def test_only_the_same_result_is_replaced(tmp_path, config):
    target = tmp_path / "x.ckpt"
    conversion.convert(SOURCE, target, None, config, verify=False)
    first = target.read_bytes()
    conversion.convert(SOURCE, target, None, config, verify=False)
    assert target.read_bytes() == first
    net = pico.model()
    weights = {parameter.name: parameter for parameter in net.get_parameters()}
    for others in (weights, {**weights, "step": Tensor(np.zeros(1, np.float32))}):
        save_weights(others, target)  # the first as training's best.ckpt
        before = target.read_bytes()
        with pytest.raises(UserError, match="x.ckpt: exists and holds other weights; .* --force"):
            conversion.convert(SOURCE, target, None, config, verify=False)
        assert target.read_bytes() == before
    conversion.convert(SOURCE, target, None, config, verify=False, force=True)
    assert target.read_bytes() == first


def test_the_checksum_is_that_of_the_weights_that_were_read(tmp_path, config, monkeypatch):
    """A run may replace its best weights during the conversion."""
    source = tmp_path / "source.bin"
    source.write_bytes(SOURCE.read_bytes())

    def replace_source(*arguments):
        source.write_bytes(b"others")
        return verify(*arguments)

    verify = conversion._verify
    monkeypatch.setattr(conversion, "_verify", replace_source)
    done = conversion.convert(source, tmp_path / "x.ckpt", None, config, verify=True)
    assert done.sources == {source: hashlib.sha256(SOURCE.read_bytes()).hexdigest()}


def test_verifying_computes_nothing(tmp_path, config, monkeypatch):
    """Devices compute float32 in ways of their own, which says nothing about the file."""
    monkeypatch.setattr(CvT, "construct", None)
    done = conversion.convert(SOURCE, tmp_path / "x.ckpt", None, config, verify=True)
    assert done.verified == 203


def test_a_file_that_was_written_shorter_is_not_kept(tmp_path, config, monkeypatch):
    def save_less(net, path):
        parameters = {parameter.name: parameter for parameter in net.get_parameters()}
        save_weights({n: p for n, p in parameters.items() if n != "head.bias"}, path)

    monkeypatch.setattr(conversion, "save_weights", save_less)
    with pytest.raises(UserError, match="the written head.bias differs"):
        conversion.convert(SOURCE, tmp_path / "x.ckpt", None, config, verify=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["cvt_13", "cvt_21", "cvt_w24"])
def test_published_variants_are_recognised(variant):
    names = official.NAMES[variant]
    weights = {name: shape for name, shape in names.items() if "num_batches" not in name}
    _, renamed = to_ours(weights)
    nothing = np.zeros(())
    tensors = {renamed[n]: np.broadcast_to(nothing, shape) for n, shape in weights.items()}
    assert conversion._recognise(Path("x"), tensors) == variant


def test_our_own_variants_are_recognised(tmp_path):
    net = create_model("cvt_nano", num_classes=7)
    save_weights(net, tmp_path / "x.ckpt")
    done = conversion.convert(tmp_path / "x.ckpt", tmp_path / "y.safetensors", None, None, False)
    assert done.model == "cvt_nano" and len(done.report.loaded) == len(list(net.get_parameters()))
    assert done.verified is None
    assert set(conversion._VARIANTS.values()) <= set(list_models())


@pytest.mark.parametrize("values", [np.float32(1), np.ones((2, 2), np.float32), "text"])
@pytest.mark.parametrize("name", ["head.bias", "stage0.patch_embed.proj.weight"])
def test_a_tensor_of_another_kind_is_one_line(tmp_path, name, values):
    """Also numbers and strings, which a .ckpt may hold beside the tensors."""
    weights = {p.name: p for p in create_model("cvt_nano", num_classes=7).get_parameters()}
    del weights[name]
    extra = {name: values if isinstance(values, str) else values.tolist()}
    if np.ndim(values):
        weights[name], extra = Tensor(values), {}
    save_checkpoint(weights, tmp_path / "x.ckpt", **extra)
    with pytest.raises(UserError, match=rf"x.ckpt: {name} has shape \[.*\], must have [14] dim"):
        conversion.convert(tmp_path / "x.ckpt", tmp_path / "y.ckpt", None, None, False)


def test_a_backbone_without_head_converts(tmp_path):
    sizes = {key: list(value) for key, value in TINY.items() if key != "num_classes"}
    save_weights(create_model("cvt_nano", num_classes=0, **sizes), tmp_path / "x.ckpt")
    config = Config(model=ModelConfig(name="cvt_nano", image_size=32, **sizes))
    done = conversion.convert(tmp_path / "x.ckpt", tmp_path / "y.ckpt", None, config, True)
    assert done.verified == len(done.report.loaded)
    assert (tmp_path / "x.ckpt").read_bytes() == (tmp_path / "y.ckpt").read_bytes()


def test_help_tells_every_option(run_here):
    done = run_here("convert.py", "--help")
    assert done.returncode == 0
    for option in ("--src", "--dst", "--model", "--entry", "--verify", "--force", "--config"):
        assert option in done.stdout
