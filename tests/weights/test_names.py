"""The three sets of names, by the full lists of the published variants."""

import json

import pytest

from src.errors import UserError
from src.weights.names import HUGGING_FACE, OFFICIAL, OURS, from_huggingface, to_ours
from tests.golden import pico
from tools.check_device.golden import official

THEIRS = json.loads((pico.FOLDER / "hf_state_dict_keys.json").read_text())
VARIANTS = ["cvt_13", "cvt_21", "cvt_w24"]


def weights(names: dict) -> dict:
    return {name: shape for name, shape in names.items() if "num_batches_tracked" not in name}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_name_corresponds_to_one_of_the_same_shape(variant):
    ours = {
        naming: {renamed[name]: shape for name, shape in names.items()}
        for names in (weights(official.NAMES[variant]), weights(THEIRS[variant]))
        for naming, renamed in [to_ours(names)]
    }
    assert list(ours) == [OFFICIAL, HUGGING_FACE]
    assert ours[OFFICIAL] == ours[HUGGING_FACE]
    assert len(ours[OFFICIAL]) == len(weights(official.NAMES[variant]))
    back = {official.official_name(name): shape for name, shape in ours[OFFICIAL].items()}
    assert back == weights(official.NAMES[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_names_stay(variant):
    ours = list(to_ours(weights(official.NAMES[variant]))[1].values())
    assert to_ours(ours) == (OURS, dict(zip(ours, ours)))


def test_each_hugging_face_name_has_an_official_one():
    for variant in VARIANTS:
        names = weights(THEIRS[variant])
        assert {from_huggingface(name) for name in names} == set(weights(official.NAMES[variant]))


def test_names_of_our_other_networks_are_ours():
    names = ["conv1.weight", "bn1.gamma", "bn1.moving_mean", "layer1.0.bn1.beta"]
    assert to_ours(names) == (OURS, dict(zip(names, names)))


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (
            ["norm.gamma", "stage0.blocks.0.norm1.weight"],
            "mixes MindSpore names .norm.gamma. with ",
        ),
        (["norm.gamma", "classifier.weight"], "mixes .* others .classifier.weight."),
        (["layernorm.weight", "head.weight"], "mixes Hugging Face names .layernorm.weight. with "),
        (["conv1.weight", "bn1.running_mean"], "2 of its 2 names belong to no CvT.*: conv1.weight"),
        (["norm.weight", "fc.weight"], "1 of its 2 names belong to no CvT.*: fc.weight"),
        (["layernorm.weight", "cvt.encoder.stages.0.x.weight"], "1 of its 2 names"),
        (["stage0.patch_embed.norm.cls_token.weight"], "1 of its 1 names"),
        (["norm.cls_token\n"], "1 of its 1 names .*: norm.cls_token\\\\n"),
        (["a", "b", "c", "d"], "4 of its 4 names .*: a, b, c and 1 more"),
    ],
)
def test_mixed_and_unknown_names_are_refused(names, pattern):
    with pytest.raises(UserError, match=pattern):
        to_ours(names)
