"""One matrix product as an exported file for each engine."""

import numpy as np
import onnx
from mindspore import Tensor, nn

CLASSES, SHAPE = 5, (3, 3, 8, 8)


class Tiny(nn.Cell):
    """Flattens and multiplies: small, but run by the engines' threads."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Dense(192, CLASSES, has_bias=False)
        weight = np.random.default_rng(1).standard_normal((CLASSES, 192)).astype(np.float32)
        self.dense.weight.set_data(Tensor(weight))

    def construct(self, x):
        return self.dense(x.reshape((x.shape[0], -1)))


def onnx_model(weight: np.ndarray, batch="n") -> "onnx.ModelProto":
    """Tiny as an ONNX graph; the weight's dtype is the arithmetic's."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Flatten", ["images"], ["flat"], axis=1),
            onnx.helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "tiny",
        [onnx.helper.make_tensor_value_info("images", kind, [batch, *SHAPE[1:]])],
        [onnx.helper.make_tensor_value_info("logits", kind, [batch, CLASSES])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 13)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
