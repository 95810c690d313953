"""Names of models."""

import re

import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model, list_models


def test_published_variants_are_listed():
    assert {"cvt_13", "cvt_21", "cvt_w24", "cvt_nano"} <= set(list_models())
    assert {"vit_base_16", "deit_small_16", "vit_nano", "vit_nano_8"} <= set(list_models())
    assert {"resnet_50", "resnet_nano", "resnet_nano_s2"} <= set(list_models())
    assert list_models() == sorted(list_models())


def test_an_argument_of_another_model_is_named_with_what_there_is():
    with pytest.raises(UserError, match="cvt_nano has no embed_dim: .* it has embed_dims, depths"):
        create_model("cvt_nano", embed_dim=8)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="did you mean cvt_13"):
        create_model("cvt13")


def test_numbers_of_numpy_are_taken():
    """labels.max() + 1 is how most scripts count the classes."""
    arrays = {"embed_dims": np.array([8, 16, 32]), "drop_path_rate": np.linspace(0, 0.1, 3)}
    net = create_model(
        "cvt_nano", np.int64(5), num_heads=[np.int32(1), 2, 4], depths=[1, 1, 1], **arrays
    )
    assert net.head.weight.shape == (5, 32)
    assert create_model("vit_nano", np.int64(3), drop_rate=np.float32(0.1)).num_classes == 3


@pytest.mark.parametrize("name", ["cvt_nano", "vit_nano", "resnet_nano"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": True}, "num_classes True: must be an integer"),
        ({"in_channels": True}, "in_channels True: must be one integer"),
        ({"num_classes": None}, "num_classes None: must be an integer"),
        ({"num_classes": "5"}, "num_classes 5: must be an integer"),
        ({"in_channels": 0}, "in_channels 0: must be one integer"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(name, options, words):
    with pytest.raises(UserError, match=words):
        create_model(name, **options)


@pytest.mark.parametrize("name", [None, 13, ["cvt_13"]])
def test_a_name_of_a_wrong_type_is_unknown(name):
    with pytest.raises(UserError, match=f"model {re.escape(repr(name))} is unknown: "):
        create_model(name)
