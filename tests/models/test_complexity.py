"""Counted parameters and MACs against the paper's table and against recorded calls."""

import dataclasses
from collections import Counter

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from src.errors import UserError
from src.models import create_model, uninitialised
from src.models.complexity import complexity
from src.models.cvt import CvT, Stage
from tests.conftest import TINY

PARAMETERS = {"cvt_13": 19_997_480, "cvt_21": 31_622_696, "cvt_w24": 277_196_392}
GMACS = {
    ("cvt_13", 224): 4.53,
    ("cvt_13", 384): 16.3,
    ("cvt_21", 224): 7.13,
    ("cvt_21", 384): 24.9,
    ("cvt_w24", 224): 60.9,
    ("cvt_w24", 384): 193.2,
}
OPTIONS = [
    {},
    {"qkv_projection": "avg"},
    {"qkv_projection": "avg", "kv_stride": 3},
    {"qkv_projection": "linear"},
    {"kv_stride": 1},
    {"kv_stride": 3},
    {"cls_token": False},
    {"patch_embed": "patch"},
    {"num_classes": 0},
    {"mlp_ratio": 2.5, "in_channels": 1},
    {"pos_embed": True, "image_size": (40, 56)},
]


def create(name, **options):
    with uninitialised():
        return create_model(name, **options)


def record(monkeypatch, net, images):
    """MACs by (stage, kind) and output grids by stage, from the tensors of one real pass.

    Each is the number of outputs times the products summed in one of them.
    """
    macs, grids, place = Counter(), {}, ["head"]
    convolve, apply, multiply = nn.Conv2d.construct, nn.Dense.construct, ops.BatchMatMul.__call__
    stage = Stage.construct

    def conv2d(cell, x):
        y = convolve(cell, x)
        window = np.prod(cell.kernel_size) * x.shape[1] // cell.group
        macs[place[-1], "convolution"] += int(y.size * window)
        return y

    def dense(cell, x):
        y = apply(cell, x)
        macs[place[-1], "linear"] += y.size * x.shape[-1]
        return y

    def batch_matmul(product, a, b):
        y = multiply(product, a, b)
        macs[place[-1], "attention"] += y.size * a.shape[-1]
        return y

    def enter_stage(cell, *inputs):
        place.append(f"stage{len(grids)}")
        y = stage(cell, *inputs)
        grids[place.pop()] = y[1:]
        return y

    monkeypatch.setattr(nn.Conv2d, "construct", conv2d)
    monkeypatch.setattr(nn.Dense, "construct", dense)
    monkeypatch.setattr(ops.BatchMatMul, "__call__", batch_matmul)
    monkeypatch.setattr(Stage, "construct", enter_stage)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    if isinstance(net, CvT):  # every token, as the paper counts; logits need no others of the last
        tokens, cls = net.forward_features(images)
        feature = net.norm(tokens.mean((2, 3)) if cls is None else cls)
        if net.num_classes:
            net.head(feature)
    else:
        net(images)
    return {key: count for key, count in macs.items() if count}, grids


@pytest.mark.parametrize("name, size", GMACS, ids=lambda value: str(value))
def test_the_papers_table(name, size):
    """Tables 2 and 3: exact parameters, MACs within 1 %."""
    total = complexity(create(name), size).total
    assert total.parameters == PARAMETERS[name]
    assert total.total_macs / 1e9 == pytest.approx(GMACS[name, size], rel=0.01)


def test_kv_stride_1_costs_what_the_paper_says():
    """Table 5: 6.55 G (counted here: 6.64), because the attention products grow fourfold."""
    dear, usual = (complexity(create("cvt_13", kv_stride=s), 224).total for s in (1, 2))
    assert dear.total_macs / 1e9 == pytest.approx(6.55, rel=0.02)
    assert dear.attention_macs / usual.attention_macs == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    "name, options",
    [
        *(("cvt_nano", options) for options in OPTIONS),
        # Patches and strides of its own; the rules are those of cvt_nano.
        *(("cvt_13", options) for options in ({}, {"patch_embed": "patch"}, {"kv_stride": 3})),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_counts_equal_the_recorded_calls(monkeypatch, name, options):
    """Every stage and kind, on an image that is not square and whose edges no stride divides."""
    net = create_model(name, **{**TINY, **options}).set_train(False)
    size = options.get("image_size", (43, 54))
    counted = complexity(net, size)
    images = ms.Tensor(np.zeros((1, options.get("in_channels", 3), *size), np.float32))
    macs, grids = record(monkeypatch, net, images)
    assert {
        (row.name, kind): getattr(row, f"{kind}_macs")
        for row in counted.stages
        for kind in ("convolution", "linear", "attention")
        if getattr(row, f"{kind}_macs")
    } == macs
    assert {row.name: row.grid for row in counted.stages if row.grid} == grids
    assert counted.total.parameters == sum(p.size for p in net.trainable_params())


@pytest.mark.parametrize(
    "name, options",
    [
        ("vit_nano", {"image_size": (40, 24), "depth": 2, "mlp_ratio": 2.5, "num_classes": 7}),
        ("vit_nano", {"image_size": 16, "depth": 1, "num_classes": 0}),
        ("vit_nano_8", {"depth": 1}),
        ("resnet_nano", {"num_classes": 7}),
        ("resnet_nano_s2", {}),
        ("resnet_50", {"depths": (1, 2), "width": 8, "in_channels": 1}),
        ("resnet_50", {"depths": (2, 1), "width": 8, "block": "basic", "num_classes": 0}),
    ],
)
def test_counts_of_the_baselines_equal_the_recorded_calls(monkeypatch, name, options):
    """All rows together, by kind."""
    net = create_model(name, **options).set_train(False)
    size = options.get("image_size", 32 if name == "vit_nano_8" else (43, 54))
    total = complexity(net, size).total
    shape = (1, options.get("in_channels", 3), *((size, size) if isinstance(size, int) else size))
    macs, _ = record(monkeypatch, net, ms.Tensor(np.zeros(shape, np.float32)))
    kinds = ("convolution", "linear", "attention")
    assert {("head", k): n for k in kinds if (n := getattr(total, f"{k}_macs"))} == macs
    assert total.parameters == sum(p.size for p in net.trainable_params())


def test_totals_and_parts():
    net = create("cvt_nano", **TINY)
    counted = complexity(net, 32)
    assert [row.name for row in counted.stages] == ["stage0", "stage1", "stage2", "head"]
    for field in ("parameters", "total_macs"):
        parts = [getattr(row, field) for row in counted.stages]
        assert min(parts) > 0
        assert sum(parts) == getattr(counted.total, field)
    net.stage0.blocks[0].mlp.fc1.weight.requires_grad = False
    assert complexity(net, 32) == counted, "a frozen weight is still a parameter"


def test_the_table_shows_the_counts():
    counted = complexity(create("cvt_13"), (224, 448))
    header, *rows = str(counted).splitlines()
    assert len({len(line) for line in [header, *rows]}) == 1, "not aligned"
    assert header.split() == [
        "stage", "output", "parameters", "GMACs:", "conv", "linear", "attention", "total",
    ]  # fmt: skip
    assert rows[0].split()[:5] == ["stage0", "56", "x", "112", f"{61_696:,}"]
    total = counted.total
    kinds = (total.convolution_macs, total.linear_macs, total.attention_macs, total.total_macs)
    assert rows[-1].split() == ["total", "19,997,480", *(f"{n / 1e9:.3f}" for n in kinds)]
    small = str(complexity(create("cvt_nano", **TINY), 32))
    assert "MMACs" in small.splitlines()[0]


def test_what_can_not_be_counted_is_refused():
    net = create("cvt_nano", **TINY, pos_embed=True, image_size=32)
    with pytest.raises(UserError, match="strides"):
        complexity(net, 4)
    with pytest.raises(UserError, match="position embedding"):
        complexity(net, 64)
    with pytest.raises(TypeError, match="no rule for a Dense"):
        complexity(nn.Dense(2, 2), 32)
    net.stage1.blocks[0].mlp.extra = nn.Dense(2, 2)
    with pytest.raises(TypeError, match=r"no rule for stage1\.blocks\.0\.mlp\.extra"):
        complexity(net, 32)


def test_rows_as_plain_values():
    row = complexity(create("cvt_nano", **TINY), 32).stages[0]
    plain = row.to_dict()
    assert plain.pop("total_macs") == row.total_macs
    assert plain == {**dataclasses.asdict(row), "grid": [16, 16]}
