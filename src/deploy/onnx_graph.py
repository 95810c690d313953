"""Builder of an ONNX graph: nodes with readable names, weights, and casts where types differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# MindSpore Lite 2.0, onnxruntime, OpenVINO and ATC take it. LayerNormalization comes with opset 17;
# Lite does not know it, and in the others it is no faster than the operators in `layer_norm`.
OPSET, IR_VERSION = 13, 7
INPUT, OUTPUT = "images", "logits"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class OnnxGraph:
    """A graph under construction; a value is the name of the tensor that holds it.

    Args:
        compute: "float32" or "float16", the type that `linear`, `conv` and `matmul` work in.
        stored: type of their weights in the file; a Cast leads from it to `compute`.
    """

    def __init__(self, compute: str = "float32", stored: str = "float32") -> None:
        self.compute, self.stored = compute, stored
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}
        self._types = {INPUT: "float32"}
        self._names = {}  # how often each was asked for
        self._scopes: list[str] = []

    @contextlib.contextmanager
    def scope(self, *names: str) -> Iterator[None]:
        """Put `names` in front of the names of all nodes inside."""
        self._scopes += names
        yield
        del self._scopes[-len(names) :]

    def node(self, op: str, *inputs: str, dtype: str | None = None, **attributes) -> str:
        """Append an operator with one output.

        Args:
            op: its name in ONNX.
            inputs: values.
            dtype: type of the output where it is not the first input's.
            attributes: of the operator.

        Returns:
            The output.
        """
        name = self._unique(op)
        self._nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        self._types[name] = dtype or self._types[inputs[0]]
        return name

    def constant(self, name: str, values: np.ndarray | Sequence[int]) -> str:
        """Add numbers: floats as float32, integers as int64."""
        values = np.asarray(values)
        kind = np.float32 if values.dtype.kind == "f" else np.int64
        return self._store(name, values.astype(kind))

    def cast(self, x: str, to: str) -> str:
        """Convert to "float32" or "float16"; nothing happens to what is of this type."""
        return x if self._types[x] == to else self.node("Cast", x, dtype=to, to=TYPES[to])

    def weight(self, name: str, values: np.ndarray) -> str:
        """Add weights of a product, in the stored type, and convert them to the computing one."""
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
        """Add, in float32 where the types differ."""
        if self._types[x] != self._types[y]:
            x, y = self.cast(x, "float32"), self.cast(y, "float32")
        return self.node("Add", x, y)

    def reshape(self, x: str, *shape: int) -> str:
        """Give x a new shape; -1 is the batch, which stays open."""
        return self.node("Reshape", x, self._shared("shape", shape))

    def transpose(self, x: str, *order: int) -> str:
        """Reorder the axes of x."""
        return self.node("Transpose", x, perm=order)

    def tokens(self, x: str, start: int, end: int) -> str:
        """x [B, T, C] -> [B, end - start, C]."""
        bounds = (self._shared("index", [number]) for number in (start, end, 1, 1))
        return self.node("Slice", x, *bounds)

    def concat(self, *tokens: str) -> str:
        """Join token sequences [B, T_i, C], in float32 where the types differ."""
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

        In operators that every engine knows. MindSpore Lite 2.0 fuses Mul and Add into a Scale,
        which with several threads gives wrong numbers for a few short rows and says nothing; a
        Reshape in between prevents that where the rows are few, one for each image.
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
        """Finish the graph, which is empty afterwards.

        Args:
            logits: the value that becomes the output, float32.
            shape: of the input; None is any number.
            classes: columns of the output.
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
        while self._weights:  # one by one, because a gigabyte of them should not exist twice
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
        """A small constant that all users of these numbers share."""
        values = np.asarray(values, np.float32 if isinstance(values, float) else np.int64)
        name = "_".join([kind, *map(str, values.ravel().tolist())])
        self._weights[name] = values
        return name

    def _unique(self, last: str) -> str:
        """The scopes and `last`, with a number behind the second of a name and the following."""
        name = "/".join([*self._scopes, last])
        number = self._names[name] = self._names.get(name, 0) + 1
        return name if number == 1 else f"{name}_{number}"
