"""The files of `tiny_files` and images for them."""

import mindspore as ms
import numpy as np
import onnx
import pytest
from mindspore import Tensor

from tests.deploy.tiny_files import SHAPE, Tiny, onnx_model


@pytest.fixture(scope="module")
def weight():
    return Tiny().dense.weight.asnumpy().T.copy()


@pytest.fixture(scope="module")
def files(tmp_path_factory, weight):
    """The same network for each engine."""
    folder = tmp_path_factory.mktemp("engines")
    ms.set_context(mode=ms.GRAPH_MODE)
    example = Tensor(shape=(None, *SHAPE[1:]), dtype=ms.float32)
    ms.export(Tiny().set_train(False), example, file_name=str(folder / "t"), file_format="MINDIR")
    onnx.save(onnx_model(weight), str(folder / "t.onnx"))
    return {"mindspore": folder / "t.mindir", "onnxruntime": folder / "t.onnx",
            "openvino": folder / "t.onnx"}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
