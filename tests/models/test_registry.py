"""Names of models."""

import pytest

from src.errors import UserError
from src.models import create_model, list_models


def test_published_variants_are_listed():
    assert {"cvt_13", "cvt_21", "cvt_w24", "cvt_nano"} <= set(list_models())
    assert list_models() == sorted(list_models())


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="did you mean cvt_13"):
        create_model("cvt13")
