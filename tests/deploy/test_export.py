"""The check after an export, formats, and what is refused."""

import json
import re
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

from src.command_line import load_config
from src.deploy import export as room
from src.deploy import formats
from src.deploy.description import read_description
from src.deploy.export import ExportOptions
from src.deploy.fuse import Rewrites
from src.deploy.predictor import Predictor
from src.errors import UserError
from src.models.compiled import use_compiled
from src.recipe import build_model, uses_compiled
from tests.conftest import run_command


@pytest.fixture
def run(trained):
    return load_config(trained / "config.yaml"), trained / "checkpoints/best.ckpt"


@pytest.mark.parametrize("file_format", ["mindir", "onnx"])
def test_a_file_whose_logits_differ_is_not_kept(run, tmp_path, monkeypatch, file_format):
    """Another network is written in place of the checkpoint's."""
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")

    def fault(net, *arguments):
        net.head.bias.set_data(net.head.bias + 1e-3)
        formats.write_model(net, *arguments)

    monkeypatch.setattr(room, "write_model", fault)
    output = tmp_path / f"m.{file_format}"
    with pytest.raises(UserError, match="differ by 1.0e-03"):
        room.export(*run, output, ExportOptions(file_format), "CPU")
    assert not list(tmp_path.iterdir())
    room.export(*run, output, ExportOptions(file_format, tolerance=2e-3), "CPU")
    assert output.is_file()


def test_without_the_data_noise_is_compared(run, tmp_path, caplog):
    config, checkpoint = run
    config.data.source, config.data.path = "imagefolder", str(tmp_path / "gone")
    with caplog.at_level("INFO", logger="cvt"):
        room.export(config, checkpoint, tmp_path / "m.mindir", ExportOptions(), "CPU")
    assert "compared on noise" in caplog.text and "checked on 16 images" in caplog.text


def test_unfused_and_half_as_large(run, tmp_path, caplog):
    """The plain graph is the checkpoint's own; float16 weights halve the file, not the accuracy."""
    sizes = {}
    for options in (
        ExportOptions(rewrites=None),
        ExportOptions(weight_dtype="float16"),
        ExportOptions(rewrites=None, weight_dtype="float16"),
    ):
        path = tmp_path / f"{options.weight_dtype}-{options.rewrites is None}.mindir"
        with caplog.at_level("INFO", logger="cvt"):
            room.export(*run, path, options, "CPU")
        description = read_description(path)
        assert description["weight_dtype"] == options.weight_dtype
        assert bool(description["rewrites"]) == (options.rewrites is not None)
        sizes[path.stem] = path.stat().st_size
    plain, half, both = sizes.values()
    assert half < plain and both < plain
    found = re.findall(r"difference of the logits (\S+) ", caplog.text)
    assert float(found[0]) <= 1e-6 and all(1e-6 < float(each) < 2e-2 for each in found[1:])


@pytest.mark.parametrize("rewrites", [Rewrites(), None], ids=["fused", "unfused"])
def test_compiled_operators_stay_out_of_files(run, built, tmp_path, rewrites):
    """The run was trained in them; a file must run where they are not."""
    config, checkpoint = run
    assert uses_compiled(config.runtime)
    for kind in ("mindir", "onnx"):
        if kind == "onnx":
            pytest.importorskip("onnxruntime")
        path = tmp_path / f"m.{kind}"
        room.export(config, checkpoint, path, ExportOptions(kind, rewrites=rewrites), "CPU")
        assert b"MatMul" in path.read_bytes() and b"Custom" not in path.read_bytes()
    net = use_compiled(build_model(config), built).set_train(False)
    formats.write_model(net, (1, 3, 32, 32), tmp_path / "custom.mindir", "mindir")
    assert b"Custom" in (tmp_path / "custom.mindir").read_bytes()


def test_air_is_refused_off_ascend(run, tmp_path):
    with pytest.raises(UserError, match="run this command on a host with an Ascend card"):
        room.export(*run, tmp_path / "m.air", ExportOptions("air"), "CPU")
    with pytest.raises(UserError, match="one batch size"):
        room.export(*run, tmp_path / "m.air", ExportOptions("air", None), "Ascend")


def test_air_on_ascend_calls_the_backend(run, tmp_path, monkeypatch):
    """With a stand-in for the export function, which only works there."""
    calls = {}

    def stand_in(net, example, file_name, file_format):
        calls.update(shape=example.shape, format=file_format, net=type(net).__name__)
        Path(file_name).write_bytes(b"air")

    monkeypatch.setattr(ms, "export", stand_in)
    room.export(*run, tmp_path / "m.air", ExportOptions("air", 2), "Ascend")
    assert calls == {"shape": (2, 3, 32, 32), "format": "AIR", "net": "FusedCvT"}
    assert (tmp_path / "m.air").read_bytes() == b"air"
    assert json.loads((tmp_path / "m.air.json").read_text())["format"] == "air"


@pytest.mark.parametrize("size", [2, None])
def test_the_comparison_sees_every_image(size):
    """A graph that is wrong for the last image only, in a batch that is filled up."""
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    images[4] += 10

    def net(batch):
        return ms.Tensor(batch.asnumpy().mean((1, 2, 3))[:, None].repeat(3, 1))

    def wrong(batch):
        values = batch.mean((1, 2, 3))[:, None].repeat(3, 1)
        return np.where(values > 5, values + 1, values)

    with pytest.raises(UserError, match="differ by 1.0e"):
        room._check(net, wrong, images, size, 1e-4)
    room._check(net, wrong, images[:4], size, 1e-4)
    with pytest.raises(UserError, match="differ by nan"):
        room._check(net, lambda batch: wrong(batch) * np.nan, images, size, 1e-4)


def test_a_network_that_is_written_in_parts_is_refused(run, tmp_path, monkeypatch):
    """As MindSpore does above 1 GiB of parameters."""

    def in_parts(net, example, file_name, file_format):
        Path(file_name.replace(".mindir", "_graph.mindir")).write_bytes(b"part")

    monkeypatch.setattr(ms, "export", in_parts)
    with pytest.raises(UserError, match="1 GiB.*float16"):
        room.export(*run, tmp_path / "m.mindir", ExportOptions(), "CPU")
    assert not list(tmp_path.iterdir())


def test_what_mindspore_cannot_write_is_one_line(run, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("\nExporting PadV3 operator is not yet supported.\n\n---- C++ stack")

    monkeypatch.setattr(ms, "export", fails)
    with pytest.raises(UserError, match="as mindir: Exporting PadV3 .* supported.$"):
        room.export(*run, tmp_path / "m.mindir", ExportOptions(), "CPU")


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another --output"):
        room.export(*run, tmp_path / "file" / "m.mindir", ExportOptions(), "CPU")


def test_an_existing_file_asks_for_force(trained, tmp_path):
    """Also where only the description is left; and a folder may have any name."""
    words = ("--ckpt", str(trained / "checkpoints/best.ckpt"), "--output", "a ü/m.mindir")
    (tmp_path / "a ü").mkdir()
    (tmp_path / "a ü/m.mindir.json").write_text("mine")
    done = run_command("export.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and "exists; add --force" in done.stderr
    assert (tmp_path / "a ü/m.mindir.json").read_text() == "mine"
    done = run_command("export.py", *words, "--force", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Predictor(tmp_path / "a ü/m.mindir").batch_size == 1


def test_onnx_runs_any_batch_and_states_its_opset(run, tmp_path):
    pytest.importorskip("onnxruntime")
    room.export(*run, tmp_path / "m.onnx", ExportOptions("onnx", None), "CPU")
    assert read_description(tmp_path / "m.onnx")["opset"] == 11
    images = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    onnx = formats.open_model(tmp_path / "m.onnx")
    expected = Predictor(run[1]).logits(images)
    for size in (1, 3, 16):
        assert np.abs(onnx(images[:size]) - expected[:size]).max() <= 1e-5


def test_onnx_without_its_runtime_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        room.export(*run, tmp_path / "m.onnx", ExportOptions("onnx"), "CPU")
    (tmp_path / "m.onnx").touch()
    with pytest.raises(UserError, match="pip install onnxruntime"):
        formats.open_model(tmp_path / "m.onnx")
