"""Pretrained networks by name: what is loaded, and what is refused."""

import re

import mindspore as ms
import numpy as np
import pytest

from src.config_io import load_config
from src.deploy import Predictor
from src.errors import UserError
from src.files import sha256_of
from src.models import create_model
from src.weights import (
    create_pretrained,
    list_pretrained,
    pretrained,
    pretrained_folder,
    save_weights,
)
from tests.conftest import TINY

SIZES = {key: value for key, value in TINY.items() if key != "num_classes"}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A tiny network with weights in a folder of pretrained ones; returns it."""
    folder = tmp_path / "cvt_nano_mars"
    folder.mkdir()
    net = create_model("cvt_nano", **TINY).set_train(False)
    save_weights(net, folder / pretrained.WEIGHTS)
    entry = pretrained.Pretrained("cvt_nano", "mars", 10, sha256_of(folder / pretrained.WEIGHTS))
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    monkeypatch.setattr(pretrained, "_PRETRAINED", (entry,))
    return net


def test_the_weights_are_loaded(stored):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = create_pretrained("cvt_nano", "mars", **SIZES).set_train(False)
    images = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))
    np.testing.assert_array_equal(net(images).asnumpy(), stored(images).asnumpy())


@pytest.mark.parametrize("classes", [0, 3])
def test_other_classes_start_a_new_head(stored, classes):
    net = create_pretrained("cvt_nano", "mars", num_classes=classes, **SIZES)
    values = {p.name: p.asnumpy() for p in net.get_parameters()}
    for parameter in stored.get_parameters():
        if not parameter.name.startswith("head."):
            np.testing.assert_array_equal(values[parameter.name], parameter.asnumpy())
    assert values["head.weight"].shape == (3, 32) if classes else "head.weight" not in values


def test_what_changes_the_function_but_no_shape_is_told(stored, caplog):
    create_pretrained("cvt_nano", "mars", **SIZES, kv_stride=1)
    assert re.search("trained with the variant's own kv_stride.*; with another value", caplog.text)


def test_an_unknown_name_lists_the_known_ones(stored):
    with pytest.raises(UserError, match="no pretrained cvt_13 on mars .*: cvt_nano on mars"):
        pretrained_folder("cvt_13", "mars")


def test_a_missing_or_altered_file_is_refused(stored):
    file = pretrained_folder("cvt_nano", "mars") / pretrained.WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors: is not the file .* git checkout"):
        create_pretrained("cvt_nano", "mars", **SIZES)
    file.unlink()
    with pytest.raises(UserError, match="model.safetensors: pretrained weights are missing"):
        create_pretrained("cvt_nano", "mars", **SIZES)


def test_create_model_names_the_function_that_loads():
    with pytest.raises(UserError, match="src.weights.create_pretrained"):
        create_model("cvt_nano", pretrained="cifar10")


@pytest.mark.parametrize("model, data", list_pretrained())
def test_what_comes_with_the_repository_is_whole(model, data):
    """Its weights load by name, and its folder is enough for a Predictor, which compiles."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    folder = pretrained_folder(model, data)
    config = load_config(folder / "config.yaml")
    net = create_pretrained(model, data).set_train(False)
    assert net.num_classes == config.model.num_classes == len(config.data.class_names)
    assert config.data.path is None
    predictor = Predictor(folder)
    pixels = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    inputs = predictor.prepare(pixels)[None]
    expected = net(ms.Tensor(inputs)).asnumpy()
    np.testing.assert_allclose(predictor.logits(inputs), expected, atol=1e-4)
    assert predictor([pixels])[0][0].name == config.data.class_names[expected.argmax()]
