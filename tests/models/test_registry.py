"""Names of models."""

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
