"""Prediction from an exported file and from a checkpoint."""

import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from src.config_io import load_config, save_config
from src.data import create_eval_loader, open_source
from src.deploy import Predictor
from src.deploy.export import ExportOptions, export
from src.errors import UserError
from src.weights import save_weights
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A MINDIR for four images at once and one for any number, from the shared run."""
    folder = tmp_path_factory.mktemp("exported")
    config, weights = load_config(trained / "config.yaml"), trained / "checkpoints/best.ckpt"
    ms.set_context(mode=ms.PYNATIVE_MODE)
    for name, size in (("four", 4), ("any", None)):
        export(config, weights, folder / f"{name}.mindir", ExportOptions("mindir", size), "CPU")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["four.mindir", "four.mindir.json", "any.mindir", "any.mindir.json"]
    )
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Seven held-out digits as arrays, and as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    source = open_source("digits", None, "val")
    arrays = [source[i][0] for i in range(0, 700, 100)]
    paths = [folder / f"{i}.png" for i in range(len(arrays))]
    for array, path in zip(arrays, paths):
        Image.fromarray(array).save(path)
    return arrays, paths


def test_exported_files_and_checkpoint_agree(trained, exported, digits):
    arrays, paths = digits
    models = [exported / "four.mindir", exported / "any.mindir", trained / "checkpoints/best.ckpt"]
    results = [Predictor(model)(paths, top_k=3) for model in models]
    for result in results:
        assert [len(ranked) for ranked in result] == [3] * 7
        for ranked, expected in zip(result, results[0]):
            assert [each.label for each in ranked] == [each.label for each in expected]
            found = [each.probability for each in ranked]
            assert found == sorted(found, reverse=True)
            np.testing.assert_allclose(found, [e.probability for e in expected], rtol=1e-4)
            assert all(each.name == str(each.label) for each in ranked)
    everything = Predictor(models[0])(paths[:1], top_k=100)[0]
    assert len(everything) == 10 and sum(e.probability for e in everything) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [0, 1.5, "3", True])
def test_a_number_of_classes_that_makes_no_sense_is_refused(exported, digits, top_k):
    with pytest.raises(UserError, match=f"top_k {top_k!r}: must be a whole number from 1 to"):
        Predictor(exported / "any.mindir")(digits[1][:1], top_k=top_k)


def test_whole_numbers_of_numpy_are_as_good_as_any(exported, digits):
    number = np.int64(2)
    predict = Predictor(
        exported / "any.mindir", None, number, threads=number, max_pixels=1000 * number
    )
    assert predict.batch_size == 2 and len(predict(digits[1][:3], top_k=number)[2]) == 2
    for name in ("batch_size", "threads", "max_pixels"):
        for wrong in (True, 0, 2.0):
            with pytest.raises(UserError, match=f"{name} {wrong}: must be a whole number from 1"):
                Predictor(exported / "any.mindir", **{name: wrong})


def test_no_images_give_no_results(trained, exported):
    """A service may filter all of a batch; MindSpore's kernels would divide by zero."""
    for model in (exported / "any.mindir", trained):
        predict = Predictor(model)
        assert predict.classify(np.zeros((0, 3, 32, 32), np.float32)) == []
        assert predict.logits(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 10)
    with pytest.raises(UserError, match=r"shape \(0, 5, 3\) has no pixels"):
        predict.prepare(np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(UserError, match="array, not bytearray$"):
        predict.prepare(bytearray(b"\xff" * 99))


def test_prepared_images_of_other_types_and_shapes(trained, exported):
    """The compiled operators would read other types as float32, and OpenVINO repeats old output."""
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32))
    with pytest.raises(UserError, match="prepared images have values that are not finite$"):
        Predictor(trained).logits(np.full((1, 3, 32, 32), np.nan))
    for model in (exported / "any.mindir", trained):
        predict = Predictor(model)
        expected = predict.logits(images.astype(np.float32))
        assert np.array_equal(predict.logits(images), expected)
        np.testing.assert_allclose(predict.logits(images.astype(np.float16)), expected, atol=0.05)
        with pytest.raises(UserError, match="in floating point, not uint8; `prepare` converts"):
            predict.logits(np.zeros((2, 3, 32, 32), np.uint8))
        for shape in ((3, 32, 32), (2, 1, 32, 32)):
            with pytest.raises(UserError, match=r"takes prepared images \[N, 3, .*, not \["):
                predict.classify(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match=r"\[N, 3, 32, 32\], not \[1, 3, 48, 32\]"):
        Predictor(exported / "any.mindir").logits(np.zeros((1, 3, 48, 32), np.float32))
    assert Predictor(trained).logits(np.zeros((1, 3, 48, 32), np.float32)).shape == (1, 10)


def test_paths_images_and_arrays_give_the_same(exported, digits):
    arrays, paths = digits
    predict = Predictor(exported / "four.mindir")
    expected = predict(paths)
    assert predict(arrays) == expected
    assert predict([Image.open(path) for path in paths]) == expected
    assert predict([path.read_bytes() for path in paths]) == expected
    assert predict(np.stack(arrays)) == expected
    assert predict([]) == []


def test_the_description_beside_the_file(trained, exported):
    description = json.loads((exported / "any.mindir.json").read_text())
    assert description["input_shape"] == [None, 3, 32, 32]
    assert description["class_names"] == list("0123456789")
    assert description["preprocessing"]["image_size"] == [32, 32]
    assert len(description["checkpoint_sha256"]) == 64
    assert json.loads((exported / "four.mindir.json").read_text())["input_shape"][0] == 4


def test_the_description_of_another_file_is_refused(exported, tmp_path):
    """Its classes may be in another order; files of earlier versions do not say whose it is."""
    model, beside = tmp_path / "any.mindir", tmp_path / "any.mindir.json"
    shutil.copy(exported / "four.mindir", model)
    shutil.copy(exported / "any.mindir.json", beside)
    with pytest.raises(UserError, match="any.mindir: not the file that any.mindir.json describes"):
        Predictor(model)
    description = json.loads(beside.read_text())
    del description["file_sha256"]
    beside.write_text(json.dumps(description))
    Predictor(model)


def test_models_that_cannot_be_used(exported, tmp_path, digits):
    with pytest.raises(UserError, match="no such file"):
        Predictor(tmp_path / "none.mindir")
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="a.txt: the file is empty"):
        Predictor(tmp_path / "a.txt")
    (tmp_path / "a.mindir").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.mindir.json: missing"):
        Predictor(tmp_path / "a.mindir")
    (tmp_path / "a.mindir.json").write_text("{}")
    with pytest.raises(UserError, match="not what export.py wrote"):
        Predictor(tmp_path / "a.mindir")
    description = json.loads((exported / "any.mindir.json").read_text())
    del description["file_sha256"]
    (tmp_path / "a.mindir.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="damaged, or not a MINDIR"):
        Predictor(tmp_path / "a.mindir")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="bad.png: not a readable image"):
        Predictor(exported / "any.mindir")([tmp_path / "bad.png"])


def test_onnx_agrees_with_its_checkpoint(trained, digits, tmp_path, run_here):
    pytest.importorskip("onnxruntime")
    weights = trained / "checkpoints/best.ckpt"
    words = ("--ckpt", str(weights), "--format=onnx", "--batch_size=2", "--output=m.onnx")
    done = run_here("export.py", *words, "--runtime.mode=pynative")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    onnx = Predictor(tmp_path / "m.onnx")(digits[1])
    expected = Predictor(weights, runtime={"mode": "pynative"})(digits[1])
    for ranked, same in zip(onnx, expected):
        assert [each.label for each in ranked] == [each.label for each in same]
        assert ranked[0].probability == pytest.approx(same[0].probability, rel=1e-4)
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="m.onnx: not the file that m.onnx.json describes"):
        Predictor(tmp_path / "m.onnx")


def test_bad_images_lie_beside_the_good_ones_in_order(exported, digits, tmp_path):
    """Bad ones at the edges of batches of four, and a batch of bad ones only."""
    _, paths = digits
    (tmp_path / "bad.png").write_bytes(b"nothing")
    bad = [str(tmp_path / "bad.png"), tmp_path / "gone.png", b"nothing", np.zeros(3), 7]
    predict = Predictor(exported / "four.mindir")
    results = list(predict.stream([*bad, paths[0], bad[0], paths[1], bad[1]]))
    expected = predict(paths[:2])
    assert [results[5], results[7]] == expected
    wrong = [str(each) for each in results if isinstance(each, UserError)]
    assert len(wrong) == 7
    assert "bad.png: not a readable image" in wrong[0] and "gone.png: No such file" in wrong[1]
    with pytest.raises(UserError, match="gone.png"):
        predict([paths[0], bad[1]])
    for one in (str(paths[0]), paths[0], b"", Image.open(paths[0]), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(UserError, match="takes several images"):
            predict(one)


def test_a_damaged_network_is_not_silent(trained, digits):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    predict = Predictor(trained / "checkpoints/best.ckpt", runtime={"mode": "pynative"})
    predict.network.head.bias.set_data(predict.network.head.bias * np.nan)
    with pytest.raises(UserError, match="not finite"):
        predict(digits[1])


def test_inputs_are_those_of_the_evaluation(exported, tmp_path):
    """To the last bit, for photographs larger and smaller than the network's input."""
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 70), (131, 90), (20, 20)]):
        place = tmp_path / "val" / str(i)
        place.mkdir(parents=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize(size[::-1], Image.BICUBIC).save(place / "a.jpg")
    predict = Predictor(exported / "any.mindir")
    source = open_source("imagefolder", str(tmp_path), "val")
    batches = create_eval_loader(source, predict.preprocessing.operations(source.encoded), 3)
    expected, _ = next(batches.iterate(output_numpy=True))
    paths = [source.describe(i) for i in range(3)]
    for images in (paths, [Image.open(path) for path in paths]):
        assert np.array_equal(np.stack([predict.prepare(image) for image in images]), expected)


def test_five_lines_need_no_set_up(trained, exported, digits):
    """In a fresh interpreter, in MindSpore's own default mode, which stays."""
    code = (
        "import sys\nfrom src.deploy import Predictor\n"
        "import mindspore\nmode = mindspore.get_context('mode')\n"
        "for model in sys.argv[2:]:\n"
        "    print(Predictor(model)([sys.argv[1]])[0][0].name)\n"
        "assert mindspore.get_context('mode') == mode == mindspore.PYNATIVE_MODE\n"
    )
    models = [str(exported / "any.mindir"), str(trained)]
    command = [sys.executable, "-c", code, str(digits[1][0]), *models]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = Predictor(exported / "any.mindir")(digits[1][:1])[0][0].name
    assert done.stdout.split() == [expected] * 2, done.stderr


def test_a_checkpoint_in_four_threads(trained, digits):
    predict = Predictor(trained)
    inputs = np.stack([predict.prepare(array) for array in digits[0]])
    expected = {size: predict.logits(inputs[:size]) for size in (1, 7)}
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda k: (k, predict.logits(inputs[:k])), [1, 7] * 100)
        assert all(np.array_equal(logits, expected[size]) for size, logits in found)


def test_predictors_are_opened_in_several_threads(trained):
    """As by a server whose workers open the model at their first request."""
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: Predictor(trained), range(12)))
    assert all(each.class_names == opened[0].class_names for each in opened)


def test_threads_do_not_change_results(trained, digits):
    predict = [Predictor(trained, threads=threads) for threads in (1, 2)]
    inputs = np.stack([predict[0].prepare(array) for array in digits[0]])
    one, two = (each.logits(inputs) for each in predict)
    assert np.array_equal(one, two)


def test_a_network_is_compiled_for_few_batches(trained):
    """An odd batch is filled up to a compiled one, unless that more than doubles the work."""
    predict = Predictor(trained)
    assert [predict._padded_size(size, 0) for size in (16, 9, 3, 1, 2)] == [16, 16, 3, 1, 3]
    assert predict._padded_size(5, 0) == 5
    assert Predictor(trained)._padded_size(5, 16) == 5, "nothing is compiled yet"
    assert predict._padded_size(4, 16) == 5, "the end of a stream waits for no compilation"


def test_arguments_without_effect_are_refused(trained, exported):
    mindir = exported / "any.mindir"
    for model, options, complaint in (
        (mindir, {"runtime": {"precision": "float16"}}, "runtime.precision: is for weights only"),
        (mindir, {"engine": "openvino"}, "engine openvino: .mindir is run by mindspore"),
        (mindir, {"threads": 0}, "threads 0: must be a whole number from 1 to 1024"),
        (mindir, {"threads": 10**10}, "threads 10000000000: must be a whole number"),
        (mindir, {"batch_size": "4"}, "batch_size '4': must be a whole number"),
        (mindir, {"max_pixels": 0}, "max_pixels 0: must be a whole number"),
        (trained, {"engine": "onnxruntime"}, "engine onnxruntime: .ckpt is run by mindspore"),
        (trained, {"runtime": {"seed": 1}}, "runtime.seed: choose from mode, precision"),
        (trained, {"runtime": {"flash_attention": True}}, "flash_attention: is for Ascend"),
        (trained, {"runtime": {"precision": "bfloat16"}}, "bfloat16: MindSpore has no such"),
        (trained, {"runtime": {"precision": "fp16"}}, "runtime.precision.*Got value: fp16"),
        (trained, {"runtime": {"compiled_ops": False}}, "runtime.compiled_ops.*Got value: false"),
        (trained, {"runtime": {"mode": "Pynative"}}, "runtime.mode.*Got value: Pynative"),
    ):
        with pytest.raises(UserError, match=complaint):
            Predictor(model, **options)


def test_keys_of_the_runtime_take_effect(trained, digits, monkeypatch):
    """float16 rounds; without compiled operators the network holds none."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    inputs = np.stack([Predictor(trained).prepare(array) for array in digits[0]])
    usual = Predictor(trained, runtime={"mode": "pynative", "compiled_ops": "never"})
    half = Predictor(trained, runtime={"mode": "pynative", "precision": "float16"})
    assert type(usual.network.norm).__name__ == "LayerNorm"
    difference = abs(usual.logits(inputs) - half.logits(inputs)).max()
    assert 1e-5 < difference < 0.3


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Of the recipe as of the weights."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save_weights({"w": ms.Parameter(ms.Tensor([1.0]))}, tmp_path / "w.ckpt")
    (tmp_path / "c.yaml").write_text("model: {name: cvt_13}\n")
    with pytest.raises(UserError, match=f"^{tmp_path}/c.yaml: model.num_classes is not set"):
        Predictor("~/w.ckpt", config="~/c.yaml")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_of_an_accelerators_run_compute_in_float32_on_the_cpu(
    trained, digits, tmp_path, run_here, precision
):
    """There float16 is slow and bfloat16 missing; the user's own choice counts, in any spelling."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    shutil.copytree(trained, tmp_path / "run")
    config = load_config(trained / "config.yaml")
    config.runtime.precision = precision
    config.runtime.flash_attention = True
    save_config(config, tmp_path / "run/config.yaml")
    inputs = np.stack([Predictor(trained).prepare(array) for array in digits[0]])
    keys = {"mode": "pynative"}
    logits = [Predictor(run, runtime=keys).logits(inputs) for run in (trained, tmp_path / "run")]
    assert np.array_equal(*logits)

    words = ("eval.py", "--ckpt=run", "--runtime.mode=pynative")
    done = run_here(*words)
    assert (
        done.returncode == 0 and f"float32 instead of {precision}, which is slow" in done.stdout
    ), done.stderr
    spellings = ([f"--runtime.precision={precision}"], ["--runtime.precision", precision])
    # The refusal of bfloat16 proves each spelling, an evaluation in float16 one.
    for chosen in spellings if precision == "bfloat16" else spellings[:1]:
        done = run_here(*words, *chosen)
        assert "in float32" not in done.stdout
        if precision == "bfloat16":
            assert (
                done.returncode == 2
                and "bfloat16: MindSpore has no such kernels for the CPU" in done.stderr
            )
        else:
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("kind", "asked"), [("float32", ["CPU"]), ("float16", [])])
def test_float32_is_computed_in_float32(trained, exported, monkeypatch, kind, asked):
    """Scripts call no set-up; on accelerators MindSpore would round float32 to 11 bits."""
    devices = []
    monkeypatch.setattr("src.arithmetic.keep_float32", devices.append)
    monkeypatch.setattr("src.deploy.loaded_model.keep_float32", devices.append)
    Predictor(trained, runtime={"mode": "pynative", "precision": kind})
    assert devices == asked
    Predictor(exported / "any.mindir")
    assert devices == [*asked, "CPU"]


def test_a_limit_of_pixels(exported, digits):
    predict = Predictor(exported / "any.mindir", max_pixels=1100)
    for image in (digits[1][0].read_bytes(), digits[1][0], Image.open(digits[1][0])):
        assert predict([image])
    large = io.BytesIO()
    Image.new("1", (40, 40)).save(large, "PNG")
    for image in (large.getvalue(), Image.open(large)):
        with pytest.raises(UserError, match="at most 1100 pixels"):
            predict([image])
    with pytest.raises(UserError, match="0 x 0 pixels"):
        predict([Image.new("RGB", (0, 0))])


def test_class_names_of_another_model(exported, digits, tmp_path):
    shutil.copy(exported / "any.mindir", tmp_path)
    description = json.loads((exported / "any.mindir.json").read_text())
    description["class_names"] = ["cat", "dog"]
    (tmp_path / "any.mindir.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"has \(10,\) outputs and 2 class names"):
        Predictor(tmp_path / "any.mindir")(digits[1])


def test_files_that_are_no_images_are_not_read(exported, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(1 << 40)
    predict = Predictor(exported / "any.mindir")
    with pytest.raises(UserError, match="pipe.jpg: not a regular file; give an image file"):
        predict([tmp_path / "pipe.jpg"])
    with pytest.raises(UserError, match="large.jpg: 1048576 MiB, too much for an image of at most"):
        predict([tmp_path / "large.jpg"])
    with pytest.raises(UserError, match="^an image's path is empty"):
        predict([""])
    with pytest.raises(UserError, match="path is empty"):
        Predictor("")
