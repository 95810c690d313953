"""The .json beside an exported file, from export.py and from strangers."""

import dataclasses
import json
import time

import pytest

from src.data import Preprocessing
from src.deploy.description import check_readable, read_description
from src.errors import UserError

GOOD = {
    "input_shape": [None, 3, 32, 32],
    "class_names": ["cat", "dog"],
    "preprocessing": {
        "image_size": [32, 32], "resize": 36, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
    },
}  # fmt: skip


def write(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "m.onnx.json").write_text(text)
    return folder / "m.onnx"


def test_what_is_read(tmp_path):
    found = read_description(write(tmp_path, GOOD))
    assert found["input_shape"] == (None, 3, 32, 32) and found["class_names"] == ["cat", "dog"]
    assert found["preprocessing"].image_size == (32, 32)
    assert read_description(write(tmp_path, {**GOOD, "class_names": None}))["class_names"] == []
    fixed = {**GOOD, "input_shape": [16, 3, 32, 32]}
    assert read_description(write(tmp_path, fixed))["input_shape"][0] == 16
    with pytest.raises(UserError, match="other.onnx.json: missing"):
        read_description(tmp_path / "other.onnx")


def changed(**preprocessing):
    return {**GOOD, "preprocessing": {**GOOD["preprocessing"], **preprocessing}}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "7", "null", "{", "[" * 200_000, '{"a":' * 100_000, "\x00",
        {}, {**GOOD, "preprocessing": []}, {**GOOD, "preprocessing": None},
        {**GOOD, "input_shape": [200_000, 3, 32, 32]}, {**GOOD, "input_shape": [0, 3, 32, 32]},
        {**GOOD, "input_shape": [-1, 3, 32, 32]}, {**GOOD, "input_shape": [True, 3, 32, 32]},
        {**GOOD, "input_shape": [1.5, 3, 32, 32]}, {**GOOD, "input_shape": ["1", 3, 32, 32]},
        {**GOOD, "input_shape": [1, 3, 32]}, {**GOOD, "input_shape": []},
        {**GOOD, "input_shape": 7}, {**GOOD, "input_shape": [1, 3, 64, 64]},
        {**GOOD, "input_shape": [1, 1, 32, 32]},
        {**GOOD, "class_names": "cat"}, {**GOOD, "class_names": [1, 2]},
        {**GOOD, "class_names": {"0": "cat"}}, {**GOOD, "class_names": ["x" * 2000]},
        changed(image_size=[10**9, 10**9]), changed(image_size=[-1, 32]), changed(image_size=32),
        changed(image_size="32"), changed(image_size=[]), changed(image_size=[32.0, 32.0]),
        changed(resize=10**9), changed(resize=[32, 10**12]), changed(resize=0),
        changed(resize="36"), changed(resize=True), changed(resize={}),
        changed(mean=[0.5]), changed(mean=["a", "b", "c"]), changed(std=[0, 1, 1]),
        changed(std=None), changed(mean=[float("nan"), 0, 0]), changed(std=[float("inf"), 1, 1]),
        changed(interpolation=7), changed(interpolation="lanczos"), changed(interpolation=[]),
        changed(extra=1),
    ],
)  # fmt: skip
def test_what_export_did_not_write_is_one_line(tmp_path, content):
    start = time.monotonic()
    with pytest.raises(UserError, match="m.onnx.json: not what export.py wrote") as refused:
        read_description(write(tmp_path, content))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert time.monotonic() - start < 2


def test_what_could_not_be_read_is_not_exported():
    """The limits of a batch and of the resize, before any work."""
    preprocessing = Preprocessing((224, 224), 256, (0.5,) * 3, (0.2,) * 3)
    check_readable([445, 3, 224, 224], preprocessing, ["cat"])
    check_readable([None, 3, 224, 224], preprocessing, None)
    with pytest.raises(UserError, match="--batch_size 446: at most 445 images of this size"):
        check_readable([446, 3, 224, 224], preprocessing, None)
    large = dataclasses.replace(preprocessing, resize=4480)  # 224 at crop_ratio 0.05
    with pytest.raises(UserError, match="preprocessing.resize must lie in 1..4096 pixels"):
        check_readable([1, 3, 224, 224], large, None)


def test_a_description_that_cannot_be_read_is_not_called_missing(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(UserError, match=r"m.onnx.json: missing; keep"):
        read_description(tmp_path / "m.onnx")
    monkeypatch.setattr("src.deploy.description.read_json", refuse)
    with pytest.raises(UserError, match=r"m.onnx.json: Permission denied; keep"):
        read_description(tmp_path / "m.onnx")


def test_a_file_without_an_end_is_not_read(tmp_path):
    (tmp_path / "m.onnx.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="not what export.py wrote"):
        read_description(tmp_path / "m.onnx")
