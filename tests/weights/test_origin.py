"""What the files beside weights tell: class names, and whose head fine-tuning keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from src.config import Config, DataConfig, ModelConfig
from src.config_io import save_config
from src.data.imagenet_labels import imagenet_names, synsets
from src.models import create_model
from src.training.setup import load_pretrained
from src.weights import save_weights
from src.weights.origin import are_same_classes, class_names_of, warn_other_settings
from tests.conftest import TINY

PETS = {"0": "dog", "1": "cat"}


def write_names(folder, labels: dict) -> None:
    (folder / "config.json").write_text(json.dumps({"id2label": labels}))


def test_a_runs_names_come_before_those_of_config_json(tmp_path):
    weights = tmp_path / "x.ckpt"
    assert class_names_of(weights) is None
    write_names(tmp_path, PETS)
    assert class_names_of(weights) == class_names_of(tmp_path, 2) == ["dog", "cat"]
    assert class_names_of(tmp_path, 1) is None, "a new head in the folder of another network"
    run = Config(data=DataConfig(class_names=["fox", "hen", "owl"]))
    save_config(run, tmp_path / "config.yaml")
    assert class_names_of(weights) == class_names_of(weights, 3) == ["fox", "hen", "owl"]
    assert class_names_of(weights, 2) is None
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")  # another program's
    assert class_names_of(weights) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"num_heads": [1, 2, 4], "qkv_projection_method": ["dw_bn"] * 3}, None),
        ({"num_heads": [2, 4, 8], "stride_kv": [1] * 3}, "num_heads [2, 4, 8], not [1, 2, 4]; st"),
        ({"qkv_projection_method": ["avg"] * 3}, "['avg', 'avg', 'avg'], not ['dw_bn', 'dw_bn'"),
        ({"num_heads": 3}, None),  # another program's
    ],
)
def test_settings_of_hugging_face_that_no_shape_shows_are_compared(
    tmp_path, caplog, settings, words
):
    net = create_model("cvt_nano", **{**TINY, "num_heads": (1, 2, 4)})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    warn_other_settings(tmp_path / "model.safetensors", net)
    assert words in caplog.text if words else not caplog.text


def test_imagenets_words_and_synsets_are_the_same_classes():
    words = imagenet_names()
    words[134] = "crane bird"  # spelled otherwise elsewhere
    assert are_same_classes(words, synsets())
    assert not are_same_classes(words[::-1], synsets())
    assert not are_same_classes(words, synsets()[::-1])
    assert not are_same_classes([f"plant {k}" for k in range(1000)], synsets())
    assert not are_same_classes(["dog", "cat"], ["cat", "dog"])


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (PETS, False),
        ({"0": "cat", "1": "dog"}, True),
        ({"0": "rose", "1": "tulip"}, False),
        ({"0": "LABEL_0", "1": "LABEL_1"}, True),
    ],
)
def test_fine_tuning_keeps_only_the_head_of_the_same_classes(tmp_path, labels, kept):
    sizes = {**TINY, "num_classes": 2}
    old = create_model("cvt_nano", **sizes)
    save_weights(old, tmp_path / "model.safetensors")
    write_names(tmp_path, labels)
    net = create_model("cvt_nano", **sizes)
    config = Config(model=ModelConfig(num_classes=2), data=DataConfig(class_names=["cat", "dog"]))
    notes = load_pretrained(net, str(tmp_path), config)
    same = np.array_equal(net.head.weight.asnumpy(), old.head.weight.asnumpy())
    assert same == kept and ("new head: the weights' classes were" in " ".join(notes)) != kept
    assert np.array_equal(net.norm.gamma.asnumpy(), old.norm.gamma.asnumpy())
