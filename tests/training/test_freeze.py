"""What is frozen, and that it stays as it is."""

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model
from src.training.freeze import freeze
from tests.conftest import TINY


def trained(net):
    return {p.name for p in net.trainable_params()}


def test_parts_are_named_by_their_beginning():
    net = create_model("cvt_nano", **TINY)
    before = trained(net)
    freeze(net, ["stage0", "stage2.blocks.1"])
    gone = before - trained(net)
    assert gone and all(name.startswith(("stage0.", "stage2.blocks.1.")) for name in gone)
    assert not any(name.startswith("stage2.blocks.1.") for name in trained(net))
    assert "stage2.blocks.0.norm1.gamma" in trained(net)


def test_backbone_leaves_the_head():
    net = create_model("cvt_nano", **TINY)
    freeze(net, ["backbone"])
    assert trained(net) == {"head.weight", "head.bias"}


def test_frozen_cells_change_nothing_in_training():
    """In training mode a pass would move the running statistics; the frozen cells' stay."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = create_model("cvt_nano", **TINY)
    cells = freeze(net, ["stage0"])
    before = {p.name: p.asnumpy().copy() for p in net.get_parameters()}
    net.set_train(True)
    for cell in cells:
        cell.set_train(False)
    net(ms.Tensor(np.random.default_rng(0).standard_normal((4, 3, 32, 32)), ms.float32))
    moved = {
        p.name for p in net.get_parameters() if not np.array_equal(p.asnumpy(), before[p.name])
    }
    assert moved and all(name.startswith(("stage1.", "stage2.")) for name in moved)


@pytest.mark.parametrize("parts, words", [
    (["stage9"], "no part 'stage9'"),
    (["stage"], "no part 'stage'"),
    (["backbone", "head"], "nothing is left to train"),
])  # fmt: skip
def test_parts_that_make_no_sense_are_refused(parts, words):
    with pytest.raises(UserError, match=words):
        freeze(create_model("cvt_nano", **TINY), parts)
