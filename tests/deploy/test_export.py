"""The check after an export, formats, and what is refused."""

import copy
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import mindspore as ms
import numpy as np
import pytest

import export as command
from src.build import build_model, uses_compiled
from src.config import RuntimeConfig
from src.config_io import load_config
from src.data.small_datasets import digits
from src.deploy import export as room
from src.deploy import writers
from src.deploy.description import read_description
from src.deploy.engines import open_model
from src.deploy.export import ExportOptions
from src.deploy.predictor import Predictor
from src.errors import UserError
from src.files import sha256_of
from src.models import create_model, list_models
from src.models.compiled import use_compiled
from src.weights import save_weights
from tests.conftest import ROOT, TINY

# The checkpoint's side; `test_an_existing_file_asks_for_force` computes it in graph mode.
pytestmark = pytest.mark.usefixtures("pynative_mode")

RECIPES = [p for p in sorted(ROOT.glob("config/*/*.yaml")) if p.parent.name != "study"]
MINDIR_RECIPE = ROOT / "config/imagenet/cvt_13_224.yaml"  # it trains in float16
_TINY_VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "image_size": 32}
# By family, so that a newly registered network is covered.
SMALL = {
    "cvt": {**TINY, "depths": (1, 1, 1)},
    "vit": _TINY_VIT,
    "deit": _TINY_VIT,
    "resnet": {"depths": (1, 1), "width": 4},
}
# At these sizes the networks of a family differ in little, and MINDIR has to be compiled.
FIRST = {name.split("_")[0]: name for name in reversed(list_models())}
del FIRST["cvt"], FIRST["deit"]  # MINDIR_RECIPE is CvT's; DeiT is a ViT of the same sizes


@pytest.fixture
def run(trained):
    return load_config(trained / "config.yaml"), trained / "checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The folder of m.mindir and m.onnx, as of a run in float16, and what the export logged."""
    folder, said = tmp_path_factory.mktemp("exported"), []
    config = load_config(trained / "config.yaml")
    config.runtime.precision = "float16"
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("cvt")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    for kind in ("mindir", "onnx"):
        options = ExportOptions(kind)
        room.export(config, trained / "checkpoints/best.ckpt", folder / f"m.{kind}", options, "CPU")
    logger.removeHandler(handler)
    return folder, "\n".join(said)


def differences(said):
    """The largest difference of the logits by engine, as the export logs it."""
    found = re.findall(r"in (\w+) on .* of the logits (\S+) ", said)
    assert [engine for engine, _ in found] == ["mindspore", *writers.installed_engines("onnx")]
    return [float(number) for _, number in found]


@pytest.mark.parametrize(
    "recipe, file_format",
    # At these sizes recipes differ in classes and preprocessing only, whose file is one for both
    # formats; MINDIR has to be compiled.
    [*((recipe, "onnx") for recipe in RECIPES), (MINDIR_RECIPE, "mindir")],
    ids=lambda value: f"{value.parent.name}/{value.stem}" if isinstance(value, Path) else value,
)
def test_every_recipe_is_exported(recipe, tmp_path, monkeypatch, file_format):
    """By the command that the documentation gives, at tiny sizes; half of them train in float16."""
    config = load_config(recipe)
    keys = {"embed_dims": [8, 16, 32], "depths": [1, 1, 1], "num_heads": [1, 2, 4]}
    keys |= {"image_size": 32, "num_classes": config.model.num_classes or 10}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **keys))
    save_weights(build_model(config), tmp_path / "c.ckpt")
    engines = writers.installed_engines(file_format)
    if recipe != RECIPES[0]:  # the graph is the same, so one engine is enough
        monkeypatch.setattr(room, "installed_engines", lambda _: engines[:1])
    words = [f"--ckpt={tmp_path / 'c.ckpt'}", f"--config={recipe}", f"--format={file_format}"]
    words += [f"--model.{key}={value}" for key, value in keys.items()]
    output = tmp_path / f"m.{file_format}"
    words += ["--runtime.mode=pynative", f"--output={output}"]  # the checkpoint's side
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    command.main()
    description = read_description(output)
    assert description["precision"] == description["weight_dtype"] == "float32"
    assert description["input_shape"] == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "name, file_format",
    [*((name, "onnx") for name in list_models()), *((name, "mindir") for name in FIRST.values())],
)
def test_every_network_is_exported(run, name, tmp_path, monkeypatch, file_format):
    net = create_model(name, **{"num_classes": 10, **SMALL[name.split("_")[0]]})
    save_weights(net, tmp_path / "c.ckpt")
    monkeypatch.setattr(room, "build_for_weights", lambda config: net)
    output, options = tmp_path / f"m.{file_format}", ExportOptions(file_format, None)
    room.export(run[0], tmp_path / "c.ckpt", output, options, "CPU")
    assert output.is_file()


def test_files_are_written_and_checked_on_the_cpu():
    """Also on a host with cards, whose float32 products are float16's or HF32's."""
    runtime = RuntimeConfig(device="Ascend", precision="float16", flash_attention=True, seed=3)
    for file_format in ("mindir", "onnx"):
        chosen = command._runtime(runtime, file_format)
        assert chosen == RuntimeConfig(device="CPU", seed=3)
    chosen = command._runtime(runtime, "air")
    assert chosen.device == "Ascend" and chosen.precision == "float32"


def test_precision_is_the_files_not_the_runs(run, exported, tmp_path, caplog, monkeypatch):
    """A run in float16 becomes an exact float32 file; float16 is an option."""
    config, checkpoint = run
    config.runtime.precision = "float16"
    folder, said = exported
    with caplog.at_level("INFO", logger="cvt"):
        for file_format in ("mindir", "onnx"):
            path = tmp_path / f"m.{file_format}"
            options = ExportOptions(file_format, precision="float16")
            room.export(config, checkpoint, path, options, "CPU")
            assert read_description(path)["precision"] == "float16"
            assert read_description(folder / f"m.{file_format}")["precision"] == "float32"
    assert max(differences(said)) <= 1e-5
    # OpenVINO computes float16 files in float32 on a CPU, where the weights' rounding is left.
    assert all(1e-5 < each < 2e-2 for each in differences(caplog.text))
    words = ["--ckpt", str(checkpoint), "--runtime.precision=float16", "--output=x.mindir"]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    with pytest.raises(SystemExit):
        command.main()


def test_the_reason_of_an_engine_is_told(run, tmp_path, monkeypatch):
    def broken(net, shape, path, *options):
        from src.deploy.onnx_graph import OnnxGraph

        graph = OnnxGraph()
        Path(path).write_bytes(
            graph.model(graph.node("NoSuchOperator", "images"), shape, 10).SerializeToString()
        )

    monkeypatch.setattr(room, "write_model", broken)
    with pytest.raises(UserError, match="rejects it: .*NoSuchOperator"):
        room.export(*run, tmp_path / "m.onnx", ExportOptions("onnx"), "CPU")
    assert not list(tmp_path.iterdir())


def test_files_do_not_tell_where_they_were_made(exported, trained):
    folder, _ = exported
    for file in folder.iterdir():
        content = file.read_bytes()
        for place in (trained, folder, ROOT, Path.home()):
            assert str(place).encode() + b"/" not in content


@pytest.mark.parametrize("file_format", ["mindir", "onnx"])
def test_a_file_whose_logits_differ_is_not_kept(run, tmp_path, monkeypatch, file_format):
    """Another network is written in place of the checkpoint's."""
    if file_format == "onnx":
        pytest.importorskip("onnxruntime")

    def fault(net, *arguments):
        net = copy.deepcopy(net)
        net.head.bias.set_data(net.head.bias + 1e-3)
        writers.write_model(net, *arguments)

    monkeypatch.setattr(room, "write_model", fault)
    output = tmp_path / f"m.{file_format}"
    with pytest.raises(UserError, match="differ by 1.0e-03"):
        room.export(*run, output, ExportOptions(file_format), "CPU")
    assert not list(tmp_path.iterdir())
    room.export(*run, output, ExportOptions(file_format, tolerance=2e-3), "CPU")
    assert output.is_file()


@pytest.mark.parametrize("place", ["gone", "somebody's", "without images"])
def test_without_the_data_noise_is_compared(run, tmp_path, caplog, monkeypatch, place):
    config, checkpoint = run
    config.data.source, config.data.path = "imagefolder", str(tmp_path / place)
    if place == "without images":
        empty = digits("val", "digits (val)").subset([])
        monkeypatch.setattr(room, "open_split", Mock(return_value=empty))
    elif place == "somebody's":
        refusal = PermissionError(errno.EACCES, "Permission denied")
        monkeypatch.setattr(room, "open_split", Mock(side_effect=refusal))
    names = config.data.class_names
    config.model.num_classes = config.data.class_names = None  # as in a recipe: those of the run
    with caplog.at_level("INFO", logger="cvt"):
        room.export(config, checkpoint, tmp_path / "m.mindir", ExportOptions(), "CPU")
    assert "compared on noise" in caplog.text and "checked in mindspore on 16 images" in caplog.text
    assert json.loads((tmp_path / "m.mindir.json").read_text())["class_names"] == names


def test_names_of_another_number_of_classes_are_refused(run, tmp_path):
    config, checkpoint = run
    config.data.class_names = ["x", "y", "z"]
    with pytest.raises(UserError, match="data.class_names has 3 names, but the network 10 outputs"):
        room.export(config, checkpoint, tmp_path / "m.onnx", ExportOptions("onnx"), "CPU")
    assert not list(tmp_path.iterdir())


def test_float16_weights_halve_the_file(run, exported, tmp_path, caplog):
    folder, _ = exported
    with caplog.at_level("INFO", logger="cvt"):
        for file_format in ("mindir", "onnx"):
            half, whole = (place / f"m.{file_format}" for place in (tmp_path, folder))
            room.export(*run, half, ExportOptions(file_format, weight_dtype="float16"), "CPU")
            assert read_description(half)["weight_dtype"] == "float16"
            assert read_description(whole)["weight_dtype"] == "float32"
            # Most of so small a file is the graph.
            assert half.stat().st_size < whole.stat().st_size - 20_000
    assert all(1e-5 < each < 2e-2 for each in differences(caplog.text))


def test_compiled_operators_stay_out_of_files(run, built, tmp_path):
    """The run was trained in them; a file must run where they are not."""
    config, checkpoint = run
    assert uses_compiled(config.runtime)
    for kind in ("mindir", "onnx"):
        path = tmp_path / f"m.{kind}"
        room.export(config, checkpoint, path, ExportOptions(kind), "CPU")
        assert b"MatMul" in path.read_bytes() and b"Custom" not in path.read_bytes()
    net = use_compiled(build_model(config), built).set_train(False)
    custom = tmp_path / "custom.mindir"
    example = ms.Tensor(np.zeros((1, 3, 32, 32), np.float32))
    ms.export(net, example, file_name=str(custom), file_format="MINDIR")
    assert b"Custom" in custom.read_bytes()


def test_air_is_refused_off_ascend(run, tmp_path):
    with pytest.raises(UserError, match="run this command on a host with an Ascend card"):
        room.export(*run, tmp_path / "m.air", ExportOptions("air"), "CPU")
    with pytest.raises(UserError, match="fixed batch size"):
        room.export(*run, tmp_path / "m.air", ExportOptions("air", None), "Ascend")


def test_air_on_ascend_calls_the_backend(run, tmp_path, monkeypatch):
    """With a stand-in for the export function, which only works there."""
    calls = {}

    def stand_in(net, example, file_name, file_format):
        calls.update(shape=example.shape, format=file_format, net=type(net).__name__)
        Path(file_name).write_bytes(b"air")

    monkeypatch.setattr(ms, "export", stand_in)
    room.export(*run, tmp_path / "m.air", ExportOptions("air", 2), "Ascend")
    assert calls == {"shape": (2, 3, 32, 32), "format": "AIR", "net": "CvT"}
    assert (tmp_path / "m.air").read_bytes() == b"air"
    assert json.loads((tmp_path / "m.air.json").read_text())["format"] == "air"


@pytest.mark.parametrize("size", [2, None])
def test_the_comparison_sees_every_image(size):
    """A graph that is wrong for the last image only, in a batch that is filled up."""
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    images[4] += 10
    expected = images.mean((1, 2, 3))[:, None].repeat(3, 1)

    def wrong(batch):
        values = batch.mean((1, 2, 3))[:, None].repeat(3, 1)
        return np.where(values > 5, values + 1, values)

    def compare(run, count):
        room._compare(expected[:count], run, images[:count], size, 1e-4, "engine")

    with pytest.raises(UserError, match="differ by 1.0e.* in engine"):
        compare(wrong, 5)
    compare(wrong, 4)
    with pytest.raises(UserError, match="differ by nan"):
        compare(lambda batch: wrong(batch) * np.nan, 5)


def test_a_network_that_is_written_in_parts_is_refused(run, tmp_path, monkeypatch):
    """As MindSpore does above 1 GiB of parameters."""

    def in_parts(net, example, file_name, file_format):
        Path(file_name.replace(".mindir", "_graph.mindir")).write_bytes(b"part")

    monkeypatch.setattr(ms, "export", in_parts)
    with pytest.raises(UserError, match="1 GiB.*float16"):
        room.export(*run, tmp_path / "m.mindir", ExportOptions(), "CPU")
    assert not list(tmp_path.iterdir())


def test_the_checksum_is_that_of_the_weights_that_were_read(run, tmp_path, monkeypatch):
    """A run may replace its best.ckpt during the export."""
    checkpoint = Path(shutil.copy(run[1], tmp_path / "best.ckpt"))
    before = sha256_of(checkpoint)

    def replace_checkpoint(*arguments):
        checkpoint.write_bytes(b"others")
        writers.write_model(*arguments)

    monkeypatch.setattr(room, "write_model", replace_checkpoint)
    room.export(run[0], checkpoint, tmp_path / "m.onnx", ExportOptions("onnx"), "CPU")
    description = json.loads((tmp_path / "m.onnx.json").read_text())
    assert description["checkpoint_sha256"] == before


def test_what_mindspore_cannot_write_is_one_line(run, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("\nExporting PadV3 operator is not yet supported.\n\n---- C++ stack")

    monkeypatch.setattr(ms, "export", fails)
    with pytest.raises(UserError, match="as mindir: Exporting PadV3 .* supported.$"):
        room.export(*run, tmp_path / "m.mindir", ExportOptions(), "CPU")


@pytest.mark.parametrize("file_format", ["mindir", "onnx"])
def test_a_file_has_a_name_that_engines_can_open(run, tmp_path, file_format):
    output = tmp_path / os.fsdecode(b"caf\xe9." + file_format.encode())
    with pytest.raises(UserError, match=rf"caf.\.{file_format}: engines open only names in UTF-8"):
        room.export(*run, output, ExportOptions(file_format), "CPU")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another --output"):
        room.export(*run, tmp_path / "file" / "m.mindir", ExportOptions(), "CPU")


def test_an_existing_file_asks_for_force(trained, tmp_path, run_here):
    """Also where only the description is left; and a folder may have any name."""
    words = ("--ckpt", str(trained / "checkpoints/best.ckpt"), "--output", "a ü/m.mindir")
    (tmp_path / "a ü").mkdir()
    description = tmp_path / "a ü/m.mindir.json"
    for place in (lambda: description.write_text("mine"), lambda: description.symlink_to("gone")):
        place()
        done = run_here("export.py", *words)
        assert done.returncode == 2 and "exists; add --force" in done.stderr
        assert description.is_symlink() or description.read_text() == "mine"
        description.unlink()
    description.write_text("mine")
    done = run_here("export.py", *words, "--force")
    assert done.returncode == 0, done.stderr
    assert Predictor(tmp_path / "a ü/m.mindir").batch_size == 1


def test_sigterm_leaves_no_unfinished_files(trained, tmp_path, run_here, monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    monkeypatch.setattr(room, "write_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        words = ("--ckpt", str(trained / "checkpoints/best.ckpt"), "--output", "m.onnx")
        done = run_here("export.py", *words, "--format=onnx")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done.returncode == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


def test_onnx_runs_any_batch_and_states_its_opset(run, tmp_path):
    path = tmp_path / "m.onnx"
    room.export(*run, path, ExportOptions("onnx", None), "CPU")
    assert read_description(path)["opset"] == 13
    images = np.random.default_rng(0).standard_normal((16, 3, 32, 32)).astype(np.float32)
    expected = Predictor(run[1], runtime={"mode": "pynative"}).logits(images)
    for engine in writers.installed_engines("onnx"):
        onnx = open_model(path, engine)
        for size in (1, 3, 16):
            assert np.abs(onnx(images[:size]) - expected[:size]).max() <= 1e-5


def test_onnx_without_its_packages_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        room.export(*run, tmp_path / "m.onnx", ExportOptions("onnx"), "CPU")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="pip install onnx$"):
        room.export(*run, tmp_path / "m.onnx", ExportOptions("onnx"), "CPU")


@pytest.mark.parametrize("name", ["a b", "\u00e9"])
def test_temporary_folders_that_mindspore_does_not_take(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    file = tmp_path / "dense.mindir"
    writers._write_by_mindspore(ms.nn.Dense(2, 2), (1, 2), file, "mindir")
    assert file.stat().st_size and not any((tmp_path / name).iterdir())
