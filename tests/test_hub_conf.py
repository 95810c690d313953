"""What MindSpore Hub calls."""

import pytest

from mindspore_hub_conf import create_network
from src.errors import UserError
from tests.conftest import TINY


def test_networks_are_created_by_name():
    net = create_network("cvt_nano", 7, embed_dims=(8, 16, 32), num_heads=(1, 2, 4))
    assert net.head.weight.shape == (7, 32)
    assert create_network("cvt_13", **TINY).head.weight.shape == (10, 32)
    with pytest.raises(UserError, match="did you mean cvt_nano"):
        create_network("cvt_nan")


def test_an_unknown_pretrained_network_is_refused():
    with pytest.raises(UserError, match="no pretrained cvt_13 on mars"):
        create_network("cvt_13", pretrained="mars")
