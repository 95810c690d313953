"""The estimates against a compiled graph and against sums by hand."""

import dataclasses

import pytest

from src.errors import UserError
from src.models import create_model
from src.models.attention import use_flash_attention
from tests.ascend.graphs import BATCH, DROP_RATE, IMAGE, SIZES
from tools.benchmark.estimate import (
    ASCEND_910,
    Cluster,
    activation_bytes,
    all_reduce_seconds,
    step_memory,
)


@pytest.mark.parametrize(
    "graph, precision, drop_rate",
    [("training-adamw", "float32", 0.0), ("training-sgd-float16-flash", "float16", DROP_RATE)],
)
def test_activations_are_those_that_a_graph_keeps(compiled_graph, graph, precision, drop_rate):
    """Within a tenth of what the backward pass of the compiled step reads from the forward pass."""
    net = create_model("cvt_13", **SIZES, drop_path_rate=0.1, drop_rate=drop_rate)
    if "flash" in graph:
        use_flash_attention(net)
    memory = step_memory(net, IMAGE, BATCH, precision)
    assert memory.activations == pytest.approx(compiled_graph(graph).saved_bytes(), rel=0.1)


def test_a_small_case_by_hand():
    """Each stage one block; every number of float32 that the rule names, for an image of 16 x 16.

    Stage 1: 4 channels, 1 head, 8 x 8 queries, 4 x 4 keys.
    """
    net = create_model("cvt_nano", num_classes=5, embed_dims=(4, 8, 8), num_heads=(1, 1, 1),
                       depths=(1, 1, 1), mlp_ratio=2.0)  # fmt: skip

    def stage(channels, size, dim, tokens, keys, cls=0):
        t, k = tokens + cls, keys + cls
        embedding = channels * size + tokens * (dim + 2)
        norms = 2 * t * (dim + 2)
        maps = dim * tokens + dim * (tokens + 2 * keys)
        linears = 2 * dim * (t + 2 * k) + t * dim
        return embedding + norms + maps + linears + t * k + t * dim + 3 * t * 2 * dim

    numbers = stage(3, 256, 4, 64, 16) + stage(4, 64, 8, 16, 4) + stage(8, 16, 8, 4, 1, cls=1)
    assert activation_bytes(net, 16) == 4 * (numbers + 2 * 8 + 5)
    memory = step_memory(net, 16, batch_size=3)
    trained = sum(p.size for p in net.trainable_params())
    statistics = 2 * 3 * (4 + 8 + 8)
    assert dataclasses.astuple(memory)[:4] == (
        4 * (trained + statistics), 8 * trained, 4 * (trained + statistics), 4 * trained,
    )  # fmt: skip
    assert memory.activations == 3 * activation_bytes(net, 16)
    assert memory.total == sum(dataclasses.astuple(memory))
    plain = step_memory(net, 16, 3, optimizer="sgd", average=False)
    assert (plain.moments, plain.average) == (4 * trained, 0)


def test_flash_attention_saves_the_scores():
    """2 heads of 16, 65 queries and 17 keys in float16: the scores twice against the statistics."""
    sizes = {"embed_dims": (16, 32, 32), "num_heads": (1, 2, 2), "depths": (1, 1, 1)}
    net = create_model("cvt_nano", **sizes)
    plain = activation_bytes(net, 64, compute=2)
    use_flash_attention(net)
    saved = 0
    for heads, dim, queries, keys in ((1, 16, 1024, 256), (2, 32, 256, 64), (2, 32, 65, 17)):
        scores = (4 + 2) * heads * queries * keys
        saved += scores - (4 * 16 * heads * queries + 2 * queries * dim)
    assert plain - activation_bytes(net, 64, compute=2) == saved


def test_the_all_reduce_by_hand():
    """800 bytes at 10 and 1 bytes a second: rings of 2 and 4 cards, then of 2 and 3 nodes."""
    cluster = Cluster("toy", 4, within=10.0, between=1.0)
    assert all_reduce_seconds(800, 1, cluster) == 0
    assert all_reduce_seconds(800, 2, cluster) == 2 * 0.5 * 80
    assert all_reduce_seconds(800, 4, cluster) == 2 * 0.75 * 80
    assert all_reduce_seconds(800, 8, cluster) == 2 * 0.75 * 80 + 2 * 0.5 * 200
    assert all_reduce_seconds(800, 12, cluster) == pytest.approx(120 + 2 * 2 / 3 * 200)
    assert all_reduce_seconds(10**9, 1024, ASCEND_910) < 2 * (1 / 30 + 1 / 8 / 12.5)


def test_another_network_is_refused():
    with pytest.raises(UserError, match="CvT only"):
        step_memory(create_model("resnet_nano", num_classes=2), 32, 1)
