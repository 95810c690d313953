"""Build an ONNX graph: nodes with readable names, weights, and casts between types."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Supported by MindSpore Lite 2.0, onnxruntime, OpenVINO and ATC. Opset 17 has LayerNormalization,
# which Lite lacks and which is no faster in the others than the operators in `layer_norm`.
OPSET, IR_VERSION = 13, 7
INPUT, OUTPUT = "images", "logits"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class OnnxGraph:
    """A graph under construction. A value is the name of its tensor.

    Args:
        compute: "float32" or "float16", the type in which `linear`, `conv` and `matmul` compute.
        stored: the type of their weights in the file; a Cast converts them to `compute`.
    """

    def __init__(self, compute: str = "float32", stored: str = "float32") -> None:
        self.compute, self.stored = compute, stored
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}
        self._types = {INPUT: "float32"}
        self._name_counts = {}  # uses of each name
        self._scopes: list[str] = []

    @contextlib.contextmanager
    def scope(self, *names: str) -> Iterator[None]:
        """Prefix the names of all nodes created inside with `names`."""
        self._scopes += names
        yield
        del self._scopes[-len(names) :]

    def node(self, op: str, *inputs: str, dtype: str | None = None, **attributes) -> str:
        """Append an operator with one output.

        Args:
            op: its name in ONNX.
            inputs: values.
            dtype: type of the output if it differs from the first input's.
            attributes: of the operator.

        Returns:
            The output.
        """
        name = self._unique(op)
        self._nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        self._types[name] = dtype or self._types[inputs[0]]
        return name

    def constant(self, name: str, values: np.ndarray | Sequence[int]) -> str:
        """Add a constant: floats as float32, integers as int64."""
        values = np.asarray(values)
        kind = np.float32 if values.dtype.kind == "f" else np.int64
        return self._store(name, values.astype(kind))

    def cast(self, x: str, to: str) -> str:
        """Convert to "float32" or "float16", if necessary."""
        return x if self._types[x] == to else self.node("Cast", x, dtype=to, to=TYPES[to])

    def weight(self, name: str, values: np.ndarray) -> str:
        """Add weights in the stored type and cast them to the computing type."""
        return self.cast(self._store(name, values.astype(self.stored)), self.compute)

    def linear(self, x: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """x [..., C_in], weight [C_out, C_in], bias [C_out] or None -> [..., C_out]."""
        with self.scope(name):
            x = self.matmul(x, self.weight("weight", np.ascontiguousarray(weight.T)))
            return x if bias is None else self.add(x, self.weight("bias", bias))

    def conv(
        self,
        x: str,
        name: str,
        weight: np.ndarray,
        bias: np.ndarray | None,
        stride: int,
        pads: Sequence[int],
        group: int = 1,
    ) -> str:
        """x [B, C_in, H, W], padded by (top, left, bottom, right) -> [B, C_out, H', W']."""
        with self.scope(name):
            inputs = [self.cast(x, self.compute), self.weight("weight", weight)]
            if bias is not None:
                inputs.append(self.weight("bias", bias))
            return self.node(
                "Conv",
                *inputs,
                kernel_shape=weight.shape[2:],
                strides=[stride, stride],
                pads=list(pads),
                group=group,
            )

    def matmul(self, x: str, y: str) -> str:
        """Multiply matrices in the computing type."""
        return self.node("MatMul", self.cast(x, self.compute), self.cast(y, self.compute))

    def add(self, x: str, y: str) -> str:
        """Add, in float32 if the types differ."""
        if self._types[x] != self._types[y]:
            x, y = self.cast(x, "float32"), self.cast(y, "float32")
        return self.node("Add", x, y)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape x; -1 is the batch, which stays dynamic."""
        return self.node("Reshape", x, self._shared("shape", shape))

    def transpose(self, x: str, *order: int) -> str:
        """Reorder the axes of x."""
        return self.node("Transpose", x, perm=order)

    def slice_tokens(self, x: str, start: int, end: int) -> str:
        """x [B, T, C] -> [B, end - start, C]."""
        bounds = (self._shared("index", [number]) for number in (start, end, 1, 1))
        return self.node("Slice", x, *bounds)

    def concat(self, *tokens: str) -> str:
        """Concatenate tokens [B, T_i, C], in float32 if the types differ."""
        types = {self._types[x] for x in tokens}
        kind = types.pop() if len(types) == 1 else "float32"
        return self.node("Concat", *(self.cast(x, kind) for x in tokens), axis=1)

    def layer_norm(
        self,
        x: str,
        name: str,
        gamma: np.ndarray,
        beta: np.ndarray,
        eps: float,
        single: bool = False,
    ) -> str:
        """x [B, T, C], or [B, C] if single -> float32 of that shape.

        Uses operators that every engine has. MindSpore Lite 2.0 fuses Mul and Add into a Scale,
        which with several threads silently computes wrong numbers for a few short rows. If `single`
        (one row per image), a Reshape in between prevents the fusion.
        """
        with self.scope(name):
            x = self.cast(x, "float32")
            x = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1], keepdims=1))
            square = self.node("Pow", x, self._shared("two", 2.0))
            variance = self.node("ReduceMean", square, axes=[-1], keepdims=1)
            deviation = self.node("Sqrt", self.add(variance, self.constant("eps", eps)))
            x = self.node("Mul", self.node("Div", x, deviation), self.constant("gamma", gamma))
            x = self.reshape(x, -1, len(gamma)) if single else x
            return self.add(x, self.constant("beta", beta))

    def model(self, logits: str, shape: Sequence[int | None], classes: int) -> onnx.ModelProto:
        """Create the model and empty the graph.

        Args:
            logits: the value of the output, float32.
            shape: the input's [B, C, H, W]; None for B means any batch size.
            classes: the number of logits.
        """
        self._nodes.append(helper.make_node("Identity", [logits], [OUTPUT], OUTPUT))
        batch = "batch" if shape[0] is None else shape[0]
        graph = helper.make_graph(
            self._nodes,
            "cvt",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [batch, *shape[1:]])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, classes])],
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        while self._weights:  # one by one, to avoid a second copy of a gigabyte
            name = next(iter(self._weights))
            values = self._weights.pop(name)
            model.graph.initializer.append(numpy_helper.from_array(values, name))
        return model

    def _store(self, name: str, values: np.ndarray) -> str:
        name = self._unique(name)
        self._weights[name] = values
        self._types[name] = str(values.dtype)
        return name

    def _shared(self, kind: str, values) -> str:
        """Add a small constant once for all its uses."""
        values = np.asarray(values, np.float32 if isinstance(values, float) else np.int64)
        name = "_".join([kind, *map(str, values.ravel().tolist())])
        self._weights[name] = values
        return name

    def _unique(self, last: str) -> str:
        """Return the scopes and `last`, with a number from the second use on."""
        name = "/".join([*self._scopes, last])
        number = self._name_counts[name] = self._name_counts.get(name, 0) + 1
        return name if number == 1 else f"{name}_{number}"
