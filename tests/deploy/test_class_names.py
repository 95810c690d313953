"""Names for the outputs of published weights."""

import json

import mindspore as ms
import pytest
from PIL import Image

from src.config_io import load_config
from src.deploy import Predictor
from src.deploy.class_names import known_class_names
from src.deploy.export import ExportOptions, export
from src.models import create_model

SIZES = {"embed_dims": [4, 4, 4], "depths": [1, 1, 1], "num_heads": [1, 1, 1], "image_size": 32}


@pytest.fixture
def published(tmp_path):
    """A function that writes weights and their recipe; no run trained them."""

    def write(outputs: int):
        net = create_model("cvt_nano", num_classes=outputs, **SIZES)
        ms.save_checkpoint(net, str(tmp_path / "net.ckpt"))
        recipe = {
            "model": {"name": "cvt_nano", "num_classes": outputs, **SIZES},
            "data": {"source": "imagefolder", "path": "none"},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        return tmp_path / "net.ckpt", tmp_path / "recipe.yaml"

    return write


def test_a_thousand_outputs_are_imagenets(published, tmp_path, caplog):
    weights, recipe = published(1000)
    with caplog.at_level("INFO", "cvt"):
        predictor = Predictor(weights, recipe, runtime={"mode": "pynative"})
    assert "named as ImageNet-1k's" in caplog.text
    (ranked,) = predictor([Image.new("RGB", (40, 40))], top_k=1000)
    names = {each.label: each.name for each in ranked}
    assert (names[0], names[207]) == ("tench, Tinca tinca", "golden retriever")
    export(load_config(recipe), weights, tmp_path / "net.onnx", ExportOptions("onnx"), "CPU")
    assert json.loads((tmp_path / "net.onnx.json").read_text())["class_names"][207] == names[207]


def test_names_of_hugging_face_come_first(published, tmp_path):
    """They are used for as many outputs as they name."""
    weights, recipe = published(3)
    labels = {"0": "cat", "1": "dog", "2": "fox"}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    assert Predictor(weights, recipe, runtime={"mode": "pynative"}).class_names == [
        "cat", "dog", "fox",
    ]  # fmt: skip
    assert known_class_names(tmp_path, 3) == ["cat", "dog", "fox"]
    assert known_class_names(tmp_path, 4) is None
    assert known_class_names(tmp_path, 1000)[0] == "tench, Tinca tinca"


def test_folders_do_not_rename_what_hugging_face_names(published, tmp_path):
    """The recipe leaves the number of classes to the images; sorted folders have another order."""
    weights, recipe = published(2)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "dog", "1": "cat"}}))
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "0.png")
    config = load_config(recipe)
    config.model.num_classes, config.data.path = None, str(tmp_path)
    export(config, weights, tmp_path / "net.onnx", ExportOptions("onnx"), "CPU")
    assert json.loads((tmp_path / "net.onnx.json").read_text())["class_names"] == ["dog", "cat"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"id2label": ["a", "b"]}', '{"id2label": {"0": "a", "1": 2}}',
             '{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}', "\xff",
             '{"id2label":' + "[" * 100_000,
             '{"id2label": {"0": "a", "1": "' + "b" * 10_000 + '"}}'],
)  # fmt: skip
def test_a_file_without_names_names_nothing(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert known_class_names(tmp_path / "model.safetensors", 2) is None
