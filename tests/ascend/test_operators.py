"""No operator of training or evaluation lacks Ascend support; no shape is dynamic; few messages."""

import re
from concurrent.futures import ThreadPoolExecutor

import mindspore
import pytest

from tests.ascend.graphs import GRAPHS, read_graph
from tests.ascend.operators import PAGE, TABLE, evidence, table, unsupported


@pytest.fixture(scope="module")
def graphs(compiled_graph):
    names = [*GRAPHS, "faulty"]
    with ThreadPoolExecutor(len(names)) as pool:  # most only wait for the first of their group
        return dict(zip(names, pool.map(compiled_graph, names)))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_operator_is_supported_on_ascend(graphs, name):
    assert unsupported(graphs[name].primitives) == []


def test_the_graphs_are_whole(graphs):
    """Forward, backward, clipping, update, average, drop path and the fused attention are there."""
    step = graphs["training-adamw"].primitives
    assert step["Conv2D"] == step["Conv2DBackpropFilter"] == 3 + 4 * 3
    assert step["BatchNormGrad"] == 4 * 3 and step["SoftmaxBackward"] == 4
    parameters = step["Adam"]
    assert parameters == 117 and step["Assign"] > parameters
    assert step["Square"] == 1  # of the packed gradients
    assert step["BitwiseXor"] and step["ClampScalar"]
    flash = graphs["training-sgd-float16-flash"].primitives
    assert flash["ApplyMomentum"] == parameters and not flash["BatchMatMul"]
    assert flash["FlashAttentionScore"] == flash["FlashAttentionScoreGrad"] == 4
    assert graphs["evaluation"].primitives["Conv2D"] == 3 + 4 * 3
    assert not any("Grad" in name for name in graphs["evaluation"].primitives)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_shape_is_static(graphs, name):
    assert graphs[name].dynamic == []


@pytest.mark.parametrize("name", GRAPHS)
def test_no_slice_runs_backwards(graphs, name):
    """CANN's StridedSlice takes positive strides only."""
    assert graphs[name].negative_strides == []


def test_the_class_token_is_taken_off_without_strided_gradients(graphs):
    for name in GRAPHS:
        assert not graphs[name].primitives["StridedSliceGrad"]


def test_a_step_of_several_ranks_sends_few_messages(graphs):
    """One for the gradients of so small a network; one for loss, norm and running statistics."""
    assert graphs["training-mixed-two-ranks"].primitives["AllReduce"] == 2
    assert not graphs["training-adamw"].primitives["AllReduce"]


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_in_a_graph_calls_the_host(graphs, name):
    called = {"PyExecute", "PyFunc", "PyInterpret", "Print", "TensorDump", "PyBoost"}
    assert called.isdisjoint(graphs[name].primitives)


def test_what_ascend_lacks_is_found(graphs):
    assert unsupported(graphs["faulty"].primitives) == ["Fmax"]
    assert graphs["faulty"].dynamic
    assert [n.primitive for n in graphs["faulty"].negative_strides] == ["StridedSlice"]
    assert read_graph("  %0(x) = PrimFunc_Add(%1)\n      : (<Tensor[Int32], (-2)>)").dynamic


@pytest.mark.parametrize("primitive", ["Fmax", "LSTM", "Lgamma", "NoSuchOperator"])
def test_nothing_speaks_for_what_ascend_lacks(primitive):
    assert evidence(primitive) is None


def test_the_table_in_the_documents_is_this_audit(graphs):
    """`python -m tests.ascend.operators` writes it anew.

    It is one version's: 2.7.1 splits where 2.8 slices, and each lists its own kernels.
    """
    page = PAGE.read_text()
    version = re.search(r"installed with MindSpore ([\d.]+\d)", page)[1]
    if mindspore.__version__ != version:
        pytest.skip(f"the table in docs/ascend.md is that of MindSpore {version}")
    audited = table({name: graphs[name] for name in GRAPHS})
    assert TABLE.search(page)[2] == audited
