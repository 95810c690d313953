"""Files that do more than arithmetic, or are damaged, are refused before an engine opens them."""

from pathlib import Path

import mindspore as ms
import numpy as np
import onnx
import pytest
from mindspore import Tensor, nn

from src.deploy import file_checks
from src.deploy.engines import open_model
from src.errors import UserError
from src.kernels import functions
from tests.deploy.tiny_files import onnx_model


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x0a\xff\xff\xff\xff\x0f", b"\x08\x07"])
@pytest.mark.parametrize("suffix", [".onnx", ".mindir"])
def test_damaged_files(tmp_path, content, suffix):
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="damaged, or not (an ONNX|a MINDIR) file"):
        open_model(tmp_path / f"m{suffix}")


def test_a_mindir_that_would_load_a_library_is_not_opened(built, tmp_path, monkeypatch):
    """MindSpore loads it while it opens the file, so the file must not get that far."""

    class Net(nn.Cell):
        def __init__(self):
            super().__init__()
            self.norm = functions.LayerNorm(built, 1e-5)
            self.ones = Tensor(np.ones(4, np.float32))

        def construct(self, x):
            return self.norm(x, self.ones, self.ones)

    file = tmp_path / "custom.mindir"
    ms.export(Net(), Tensor(np.zeros((2, 4), np.float32)), file_name=str(file),
              file_format="MINDIR")  # fmt: skip
    monkeypatch.setattr(ms, "load", lambda *_: pytest.fail("MindSpore has opened it"))
    with pytest.raises(
        UserError, match="custom.mindir: not opened: export.py does not write its operator Custom"
    ):
        open_model(file)


@pytest.mark.parametrize("place", ["primitive", "node", "function"])
def test_an_operator_is_found_wherever_a_mindir_names_it(files, tmp_path, place):
    from mindspore.train.mind_ir_pb2 import ModelProto

    model = ModelProto.FromString(files["mindspore"].read_bytes())
    if place == "primitive":
        model.primitives.add(name="x", op_type="PyExecute")
    elif place == "node":
        model.graph.node.add(op_type="PyExecute")
    else:
        model.functions.add().node.add(op_type="PyExecute")
    (tmp_path / "m.mindir").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="export.py does not write its operator PyExecute"):
        open_model(tmp_path / "m.mindir")


def test_weights_in_other_files_are_not_read(files, tmp_path, weight):
    """A name like ../../secret would be read by the engine."""
    from mindspore.train.mind_ir_pb2 import ModelProto

    model = ModelProto.FromString(files["mindspore"].read_bytes())
    model.graph.parameter[0].external_data.location = "../secret"
    (tmp_path / "m.mindir").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="m.mindir: not opened: it refers to other files"):
        open_model(tmp_path / "m.mindir")
    outside = onnx_model(weight)
    tensor = outside.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    constant = onnx_model(weight)
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], []
    )
    constant.graph.node.append(onnx.helper.make_node("If", ["c"], [], then_branch=inner))
    for name, each in (("weight", outside), ("inner constant", constant)):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(each.SerializeToString())
        with pytest.raises(UserError, match=f"{name}.onnx: not opened: its weights are in other"):
            open_model(path)


def test_operators_of_all_that_is_exported_are_known():
    """Those seen in the MINDIRs of every network and option, as trained and as exported."""
    seen = (
        "Add AvgPool BatchMatMul BatchNorm BiasAdd BroadcastTo Concat Constant Conv2D Depend Div "
        "Erf ExpandDims LayerNorm Load MakeTuple MatMul MaxPool Mul Muls PadV3 ReLU ReduceMean "
        "Reshape Shape SiLU Sigmoid Softmax Split Squeeze StridedSlice Transpose TupleGetItem "
        "UpdateState Cast"
    )
    assert not set(seen.split()) - set(file_checks._MINDIR_OPERATORS.split())


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(UserError, match="m.onnx: not a file"):
        open_model(Path(tmp_path / "m.onnx"))
