"""The chip's normalisation against ours."""

import json
import re

import numpy as np
import pytest

from src.data import Preprocessing
from src.deploy.aipp import aipp_config
from src.errors import UserError


def test_the_chip_computes_the_networks_input(tmp_path):
    """CANN's formula with the numbers of the text, on an image that needs no resizing."""
    preprocessing = Preprocessing((6, 8), None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    description = {
        "preprocessing": preprocessing.to_dict(),
        "class_names": None,
        "input_shape": [1, 3, 6, 8],
    }
    (tmp_path / "m.onnx.json").write_text(json.dumps(description))
    text = aipp_config(tmp_path / "m.onnx")
    assert text.startswith("aipp_op {\n") and text.endswith("}\n")
    values = dict(re.findall(r"^    (\w+): (\S+)$", text, re.M))
    assert values["src_image_size_w"] == "8" and values["src_image_size_h"] == "6"
    assert values["input_format"] == "RGB888_U8" and values["aipp_mode"] == "static"
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    low, factor = (
        np.array([float(values[f"{name}_chn_{i}"]) for i in range(3)])
        for name in ("min", "var_reci")
    )
    on_chip = ((image - low) * factor).transpose(2, 0, 1)
    np.testing.assert_allclose(on_chip, preprocessing(image), atol=1e-6)


def test_a_model_without_description_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"m.onnx.json: missing"):
        aipp_config(tmp_path / "m.onnx")
