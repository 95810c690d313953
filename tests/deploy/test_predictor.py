"""Prediction from an exported file and from a checkpoint."""

import json

import numpy as np
import pytest
from PIL import Image

from src.data import open_source
from src.deploy import Predictor
from src.errors import UserError
from tests.conftest import run_command


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A MINDIR for four images at once and one for any number, from the shared run."""
    folder = tmp_path_factory.mktemp("exported")
    for name, size in (("four", "4"), ("any", "dynamic")):
        words = ("--ckpt", str(trained / "checkpoints/best.ckpt"), "--batch_size", size)
        done = run_command("export.py", *words, "--output", f"{name}.mindir", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "largest difference of the logits 0.0e+00" in done.stdout
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
    with pytest.raises(UserError, match="must be one of .mindir .ckpt"):
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
