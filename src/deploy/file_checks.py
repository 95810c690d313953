"""Check exported files for code and references to other files before an engine opens them.

An engine does what a file says: a Custom node in a MINDIR makes MindSpore load a native library,
and tensors with external data make an engine read other files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.errors import UserError

# The operators of this project's networks, trained or exported, and close relatives. Others of
# MindSpore's can load libraries, run Python, write files or wait for other hosts.
_MINDIR_OPERATORS = """
Constant Parameter Return MakeTuple RealMakeTuple TupleGetItem RealTupleGetItem MakeList
ListGetItem Load UpdateState Depend Partial Switch Identity StopGradient
Abs Add AddExt Sub SubExt Mul Muls Div RealDiv FloorDiv Mod FloorMod Neg Pow Square Sqrt Rsqrt
Reciprocal Exp Expm1 Log Erf Tanh Sigmoid ReLU ReLU6 GeLU GELU SiLU HSwish HSigmoid Softmax
LogSoftmax Maximum Minimum Equal NotEqual Less LessEqual Greater GreaterEqual LogicalAnd
LogicalOr LogicalNot Select Cast
ScalarAdd ScalarSub ScalarMul ScalarDiv ScalarFloorDiv ScalarMod ScalarCast ScalarToTensor
TensorToScalar TensorToTuple TupleToTensor
MatMul MatMulExt BatchMatMul Dense BiasAdd Conv2D Conv2DExt Conv2DTranspose
DepthwiseConv2dNative AvgPool MaxPool AdaptiveAvgPool2D ReduceMean ReduceSum ReduceMax ReduceMin
SumExt MeanExt ReduceAll ReduceAny
LayerNorm LayerNormV3 LayerNormExt BatchNorm BatchNormExt FlashAttentionScore
PromptFlashAttention
Reshape Flatten Transpose Permute ExpandDims Squeeze Concat Split SplitV Stack Unstack Slice
SliceExt StridedSlice Gather GatherD Tile BroadcastTo Pad PadV3 Shape TensorShape DType Rank
Size ZerosLike OnesLike Zeros Ones Fill FillV2 Dropout DropoutExt
"""
_MAX_BYTES = 1 << 31  # protobuf's limit


def check_mindir(path: Path) -> None:
    """Parse a MINDIR and refuse one that does more than arithmetic on its own weights.

    Raises:
        UserError: the file is damaged, contains an unknown operator, or refers to other files.
    """
    from mindspore.train.mind_ir_pb2 import ModelProto

    model = _parse(ModelProto(), path, "a MINDIR file")
    if not model.graph.node:
        raise UserError(f"{path}: damaged, or not a MINDIR file: it has no graph; export again")
    graphs = [model.graph, *model.functions]
    kinds = {primitive.op_type for primitive in model.primitives}
    for graph in graphs:
        kinds |= {node.op_type for node in graph.node if not node.op_type.startswith("REF::")}
    unknown = sorted(kinds.difference(_MINDIR_OPERATORS.split()))
    if unknown:
        raise UserError(
            f"{path}: not opened: export.py does not write its operator "
            f"{ascii(unknown[0])[1:-1][:60]}, which could run foreign code; export the weights "
            "yourself"
        )
    if model.HasField("preprocessor") or any(
        graph.bprop_filepath or tensor.HasField("external_data")
        for graph in graphs
        for tensor in graph.parameter
    ):
        raise UserError(f"{path}: not opened: it refers to other files; export it into one file")


def check_onnx(path: Path) -> bool:
    """Parse an ONNX file and refuse one whose weights are in other files.

    Returns:
        Whether it is quantized.

    Raises:
        UserError: the file is damaged or has external data, or `onnx` is not installed.
    """
    try:
        from onnx import ModelProto
    except ImportError:
        raise UserError("checking ONNX files needs onnx: pip install onnx") from None
    model = _parse(ModelProto(), path, "an ONNX file")
    if not model.graph.node:
        raise UserError(f"{path}: damaged, or not an ONNX file: it has no graph; export again")
    for tensor in _tensors(model):
        if tensor.external_data or tensor.data_location == tensor.EXTERNAL:
            raise UserError(
                f"{path}: not opened: its weights are in other files (external data); export it "
                "into one file"
            )
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _parse(model: Any, path: Path, kind: str) -> Any:
    """Parse a file into a protobuf message."""
    if not path.is_file() or path.stat().st_size >= _MAX_BYTES:
        raise UserError(f"{path}: not a file of less than 2 GiB; export again")
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # protobuf's DecodeError derives from Exception
        known = isinstance(error, (ValueError, RuntimeError))
        if not known and type(error).__name__ != "DecodeError":
            raise
        raise UserError(f"{path}: damaged, or not {kind}; export again") from error
    return model


def _tensors(model: Any) -> Iterator[Any]:
    """Yield every tensor of an ONNX model, including inner graphs, functions and constants."""
    waiting = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                yield from attribute.tensors
                for sparse in (*attribute.sparse_tensors, attribute.sparse_tensor):
                    yield from (sparse.values, sparse.indices)
                yield attribute.t
