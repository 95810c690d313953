"""ONNX files in onnxruntime and OpenVINO against the networks they were written from."""

import mindspore as ms
import numpy as np
import onnx
import pytest
from onnx import TensorProto, shape_inference

from src.deploy import onnx_writer
from src.deploy.engines import open_model
from src.deploy.onnx_graph import OPSET
from src.deploy.onnx_writer import write_onnx
from src.errors import UserError
from tests.deploy.networks import NETWORKS, network
from tools.check_device.golden import official

pytestmark = pytest.mark.usefixtures("pynative_mode")

CASES = {case["tag"]: case for case in official.DESCRIPTION["cases"]}
NANO = [tag for tag in CASES if tag.startswith("nano")]
ENGINES = ("onnxruntime", "openvino")
# What MindSpore Lite 2.0 ran, and what ResNet and the exact GELU need beyond it.
OPERATORS = """
Add Cast Concat Conv Div Identity MatMul Mul Pow ReduceMean Reshape Sigmoid Slice Softmax Sqrt Sub
Transpose
"""
BEYOND = {"vit": {"Erf"}, "resnet": {"Relu", "GlobalAveragePool"}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write one of `NETWORKS` for any batch, once: the file, images, the network's output."""
    files = {}

    def write(name):
        if name not in files:
            net, images = network(name)
            path = tmp_path_factory.mktemp(name) / "m.onnx"
            write_onnx(net, (None, *images.shape[1:]), path)
            files[name] = path, images, net(ms.Tensor(images)).asnumpy()
        return files[name]

    return write


def run(path, images, engine):
    pytest.importorskip(engine)
    return open_model(path, engine)(images)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_and_option_at_any_batch(written, name, engine):
    path, images, expected = written(name)
    for count in (1, 3):
        found = run(path, images[:count], engine)
        assert found.shape == expected[:count].shape
        assert np.abs(found - expected[:count]).max() <= 5e-6 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tag", NANO)
def test_logits_equal_the_official_ones(tmp_path, tag, engine):
    case = CASES[tag]
    images = official.images(case).asnumpy()
    write_onnx(official.model(case), images.shape, tmp_path / "m.onnx")
    found = run(tmp_path / "m.onnx", images, engine)
    assert np.abs(found - official.REFERENCE[f"{tag}/logits"]).max() <= 2e-5


@pytest.mark.big
def test_a_published_variant_equals_the_official_one(tmp_path):
    tag = "cvt_13_192x256"
    case = CASES[tag]
    images, expected = official.images(case).asnumpy(), official.REFERENCE[f"{tag}/logits"]
    write_onnx(official.model(case), (None, *images.shape[1:]), tmp_path / "m.onnx")
    for engine in ENGINES:
        for count in (1, 3):
            found = run(tmp_path / "m.onnx", np.resize(images, (count, *images.shape[1:])), engine)
            wanted = np.resize(expected, found.shape)
            assert np.abs(found - wanted).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_is_well_formed_and_plain(written, name):
    """Shapes fit throughout, and nothing is in it that an engine may not know or take."""
    path, images, expected = written(name)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)] and OPSET == 13
    used = {node.op_type for node in model.graph.node}
    assert used <= set(OPERATORS.split()) | BEYOND.get(name.split("-")[0], set()) | (
        {"MaxPool"} if name == "resnet-stem" else set()
    )
    assert all(numpy.size for numpy in map(onnx.numpy_helper.to_array, model.graph.initializer))
    for end, shape in ((model.graph.input, images.shape), (model.graph.output, expected.shape)):
        assert len(end) == 1
        sizes = [d.dim_param or d.dim_value for d in end[0].type.tensor_type.shape.dim]
        assert sizes == ["batch", *shape[1:]]


def test_names_tell_stage_block_and_layer(written):
    names = [node.name for node in onnx.load(written("conv")[0]).graph.node]
    assert len(set(names)) == len(names)
    for name in (
        "stage0/patch_embed/proj/Conv",
        "stage1/block0/attn/conv_proj_k/conv/Conv",
        "stage2/block1/mlp/fc1/MatMul",
        "head/MatMul",
    ):
        assert name in names
    # The class token alone is the last block's query.
    assert "stage2/block0/attn/conv_proj_q/conv/Conv" in names
    assert not any(name.startswith("stage2/block1/attn/conv_proj_q") for name in names)


@pytest.mark.parametrize(
    ("name", "batch"),
    [("conv", None), *((name, 3) for name in ("conv", "avg", "vit", "resnet-stem"))],
)
def test_float16_weights_halve_the_file_and_arithmetic_follows_precision(tmp_path, name, batch):
    net, images = network(name)
    expected, sizes = net(ms.Tensor(images)).asnumpy(), {}
    for options in ((), ("float16",), ("float32", "float16")):
        path = tmp_path / "m.onnx"
        write_onnx(net, (batch, *images.shape[1:]), path, *options)
        sizes[options] = path.stat().st_size
        model = shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
        computed = {types[n.output[0]] for n in model.graph.node if n.op_type in ("MatMul", "Conv")}
        half = "float16" in options[1:]
        assert computed == {TensorProto.FLOAT16 if half else TensorProto.FLOAT}
        norms = {types[n.output[0]] for n in model.graph.node if n.op_type in ("Pow", "Softmax")}
        assert norms <= {TensorProto.FLOAT}
        for engine in ENGINES:
            found = run(path, images, engine)
            limit = 2e-2 if options else 5e-6
            assert np.abs(found - expected).max() <= limit * np.abs(expected).max()
    plain, *halves = sizes.values()
    constant = 30_000  # bytes of names and shapes
    assert all(half - constant < 0.6 * plain for half in halves)


def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Dense is not supported; use --format mindir"):
        write_onnx(ms.nn.Dense(2, 2), (1, 3, 8, 8), tmp_path / "m.onnx")
    net, images = network("conv")
    monkeypatch.setattr(onnx_writer, "MAX_BYTES", 50_000)
    with pytest.raises(UserError, match="exceed .* float16"):
        write_onnx(net, images.shape, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
