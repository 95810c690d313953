"""Prediction from an exported file and from a checkpoint."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.data import eval_batches, open_source
from src.deploy import Predictor
from src.errors import UserError
from tests.conftest import ROOT, run_command


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A MINDIR for four images at once and one for any number, from the shared run."""
    folder = tmp_path_factory.mktemp("exported")
    for name, size in (("four", "4"), ("any", "dynamic")):
        words = ("--ckpt", str(trained / "checkpoints/best.ckpt"), "--batch_size", size)
        done = run_command("export.py", *words, "--output", f"{name}.mindir", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert float(re.search(r"difference of the logits (\S+)", done.stdout)[1]) <= 1e-5
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


def test_models_that_cannot_be_used(exported, tmp_path, digits):
    with pytest.raises(UserError, match="no such file"):
        Predictor(tmp_path / "none.mindir")
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="must be one of .mindir .onnx .ckpt"):
        Predictor(tmp_path / "a.txt")
    (tmp_path / "a.mindir").write_bytes(b"nothing")
    with pytest.raises(UserError, match="a.mindir.json: missing"):
        Predictor(tmp_path / "a.mindir")
    (tmp_path / "a.mindir.json").write_text("{}")
    with pytest.raises(UserError, match="not what export.py wrote"):
        Predictor(tmp_path / "a.mindir")
    (tmp_path / "a.mindir.json").write_text((exported / "any.mindir.json").read_text())
    with pytest.raises(UserError, match="damaged, or no MINDIR"):
        Predictor(tmp_path / "a.mindir")
    (tmp_path / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="bad.png: not a readable image"):
        Predictor(exported / "any.mindir")([tmp_path / "bad.png"])


def test_onnx_agrees_with_its_checkpoint(trained, digits, tmp_path):
    pytest.importorskip("onnxruntime")
    weights = trained / "checkpoints/best.ckpt"
    words = ("--ckpt", str(weights), "--format=onnx", "--batch_size=2", "--output=m.onnx")
    done = run_command("export.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
    onnx, expected = (Predictor(path)(digits[1]) for path in (tmp_path / "m.onnx", weights))
    for ranked, same in zip(onnx, expected):
        assert [each.label for each in ranked] == [each.label for each in same]
        assert ranked[0].probability == pytest.approx(same[0].probability, rel=1e-4)
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged, or no ONNX"):
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
    predict = Predictor(trained / "checkpoints/best.ckpt")
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
    batches = eval_batches(source, predict.preprocessing.operations(source.encoded), 3)
    expected, _ = next(batches.iterate(output_numpy=True))
    paths = [source.describe(i) for i in range(3)]
    for images in (paths, [Image.open(path) for path in paths]):
        assert np.array_equal(np.stack([predict.prepare(image) for image in images]), expected)


def test_five_lines_need_no_set_up(exported, digits):
    """In a fresh interpreter, in MindSpore's own default mode."""
    code = (
        "import sys\nfrom src.deploy import Predictor\n"
        "print(Predictor(sys.argv[1])([sys.argv[2]])[0][0].name)\n"
    )
    command = [sys.executable, "-c", code, str(exported / "any.mindir"), str(digits[1][0])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = Predictor(exported / "any.mindir")(digits[1][:1])[0][0].name
    assert done.stdout.split() == [expected], done.stderr
