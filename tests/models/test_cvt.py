"""The network against the official implementation's numbers, and its options."""

import mindspore as ms
import numpy as np
import pytest

from src.errors import UserError
from src.models import create_model, uninitialised
from tests.conftest import TINY
from tools.check_device.golden import official

CASES = {case["tag"]: case for case in official.DESCRIPTION["cases"]}
COUNTS = {"cvt_13": 19_997_480, "cvt_21": 31_622_696, "cvt_w24": 277_196_392}


def noise(*shape):
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def official_model(tag):
    with uninitialised():  # every parameter gets its official value
        return official.model(CASES[tag])


@pytest.fixture(scope="module")
def published():
    """A network by its case; one at a time, because cvt_w24 takes 1 GB."""
    nets = {}

    def create(tag):
        case = CASES[tag]
        weights = tuple((k, str(v)) for k, v in case.items() if k not in ("tag", "input_shape"))
        if weights not in nets:
            nets.clear()
            nets[weights] = official_model(tag)
        return nets[weights]

    yield create
    nets.clear()


def check_logits(net, tag, limit=2e-5):
    logits = net(official.images(CASES[tag])).asnumpy()
    assert np.abs(logits - official.REFERENCE[f"{tag}/logits"]).max() <= limit


@pytest.mark.parametrize("tag", [tag for tag in CASES if tag.startswith("nano")])
def test_logits_equal_the_official_ones(tag):
    """The first as a graph, in which the options below equal what PyNative computes."""
    ms.set_context(mode=ms.GRAPH_MODE if tag == "nano_64" else ms.PYNATIVE_MODE)
    check_logits(official_model(tag), tag)


@pytest.mark.big
@pytest.mark.parametrize("tag", [tag for tag in CASES if not tag.startswith("nano")])
def test_published_variants_equal_the_official_ones(published, tag):
    """Logits, parameter count, and every name and shape of the official state dict.

    `test_compiled.py` has one as a graph.
    """
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = published(tag)
    check_logits(net, tag, 5e-5 if "w24" in tag else 2e-5)
    variant = CASES[tag]["model"]
    assert sum(p.size for p in net.trainable_params()) == COUNTS[variant]
    ours = {official.official_name(p.name): list(p.shape) for p in net.get_parameters()}
    theirs = official.NAMES[variant]
    assert ours == {n: s for n, s in theirs.items() if not n.endswith("num_batches_tracked")}
    if tag == "cvt_13_192x256":
        check_stages(net, tag)


@pytest.mark.parametrize("tag", [tag for tag in CASES if tag.startswith("nano")])
def test_stage_outputs_equal_the_official_ones(tag):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    check_stages(official_model(tag), tag)


def check_stages(net, tag):
    """Mean, unbiased deviation and largest magnitude of each stage, and the class token."""
    case = CASES[tag]
    maps = net.forward_pyramid(official.images(case))
    for i, x in enumerate(x.asnumpy().astype(np.float64) for x in maps):
        found = [x.mean(), x.std(ddof=1), np.abs(x).max()]
        np.testing.assert_allclose(found, official.REFERENCE[f"{tag}/stage{i}"], rtol=1e-4)
    last, cls = net.forward_features(official.images(case))
    assert np.array_equal(last.asnumpy(), maps[-1].asnumpy())
    if cls is None:
        assert f"{tag}/cls_token" not in official.REFERENCE
    else:
        assert np.abs(cls.asnumpy() - official.REFERENCE[f"{tag}/cls_token"]).max() <= 2e-5


def test_pyramid_has_a_map_per_stage():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    net = create_model("cvt_13", **TINY).set_train(False)
    shapes = [x.shape for x in net.forward_pyramid(noise(2, 3, 48, 64))]
    assert shapes == [(2, 8, 12, 16), (2, 16, 6, 8), (2, 32, 3, 4)]


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_projection": "linear", "patch_embed": "patch"},
        {"qkv_projection": "avg", "kv_stride": 3, "num_classes": 0},
        {"pos_embed": True, "image_size": 32, "mlp_ratio": 2.0, "kv_stride": 1, "in_channels": 1},
        {"pos_embed": (True, False, False), "image_size": (32, 32), "cls_token": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_agree_in_both_modes(options):
    """One image, and the compiled graph against the operators run one by one."""
    net = create_model("cvt_nano", **{**TINY, **options}).set_train(False)
    images = noise(1, options.get("in_channels", 3), 32, 32)
    graph = net(images).asnumpy()
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert graph.shape == (1, options.get("num_classes", 10) or 32)
    assert np.abs(graph - net(images).asnumpy()).max() <= 1e-5


def test_options_change_the_network():
    """Each option has the parameters that it should have, so none is without effect."""

    def names(**options):
        return {p.name for p in create_model("cvt_nano", **{**TINY, **options}).get_parameters()}

    plain = names()
    assert "stage2.cls_token" in plain - names(cls_token=False)
    assert not any("conv_proj" in name for name in names(qkv_projection="linear"))
    assert names(pos_embed=True, image_size=32) - plain == {f"stage{i}.pos_embed" for i in range(3)}
    patches = create_model("cvt_13", **TINY, patch_embed="patch")
    assert [patches.stage0.patch_embed.proj.kernel_size[0]] == [4]


def test_a_sample_does_not_depend_on_its_batch():
    net = create_model("cvt_nano", **TINY).set_train(False)
    images = noise(3, 3, 32, 32)
    ms.set_context(mode=ms.PYNATIVE_MODE)
    alone = net(images[1:2]).asnumpy()
    assert np.abs(net(images).asnumpy()[1:2] - alone).max() <= 1e-5


def test_initialisation_is_the_official_one():
    net = create_model("cvt_13", num_classes=1000)
    values = {p.name: p.asnumpy() for p in net.get_parameters()}
    for name in ("stage2.blocks.3.mlp.fc1.weight", "head.weight"):
        assert abs(values[name].std() - 0.02) < 5e-4
        assert np.abs(values[name]).max() > 0.06, "not cut at two standard deviations"
    assert not values["stage2.blocks.3.mlp.fc1.bias"].any()
    fan_ins = {"stage1.patch_embed.proj": 64 * 9, "stage0.patch_embed.proj": 3 * 49}
    for name, fan_in in fan_ins.items():
        for value in (values[f"{name}.weight"], values[f"{name}.bias"]):
            assert np.abs(value).max() <= fan_in**-0.5
            assert abs(value.std() * (3 * fan_in) ** 0.5 - 1) < 0.2
    depthwise = values["stage2.blocks.0.attn.conv_proj_q.conv.weight"]
    assert 0.9 / 3 < np.abs(depthwise).max() <= 1 / 3
    assert 0 < np.abs(values["head.bias"]).max() <= 384**-0.5
    assert (values["stage2.blocks.0.norm1.gamma"] == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 7}, "8 pixels or more"),
        ({"image_size": (32, 4)}, "8 pixels or more"),
        ({"embed_dims": (8, 16, 30)}, "not a multiple"),
        ({"depths": (1, 1)}, "depths"),
        ({"depths": (1, 0, 1)}, "depths"),
        ({"drop_path_rate": (0.1, 0.2)}, "drop_path_rate"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"qkv_projection": "dense"}, "qkv_projection"),
        ({"patch_embed": "x"}, "patch_embed"),
        ({"kv_stride": 0}, "kv_stride"),
        ({"kv_stride": 10**9}, "kv_stride"),
        ({"mlp_ratio": 1e9}, "mlp_ratio"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio"),
        ({"depths": [1, 1, 10**9]}, "depths"),
        ({"embed_dims": [8, 16, 10**9]}, "embed_dims"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"pos_embed": True}, "image_size"),
        ({"num_classes": -1}, "num_classes"),
        ({"image_size": "32"}, "image_size '32': must be"),
        ({"image_size": (32.0, 32)}, "image_size .*: must be"),
        ({"embed_dims": 32}, "embed_dims 32: must be 3 integers"),
        ({"depths": "111"}, "depths '111': must be 3 integers"),
        ({"mlp_ratio": "2"}, "mlp_ratio '2': must be a number"),
        ({"kv_stride": "2"}, "kv_stride"),
        ({"cls_token": "False"}, "cls_token 'False': must be True or False"),
        ({"pos_embed": [True, "no", False], "image_size": 32}, "pos_embed 'no': must be"),
    ],
)
def test_arguments_that_make_no_network_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        create_model("cvt_nano", **{**TINY, **options})


def test_images_that_cannot_work_are_refused():
    net = create_model("cvt_nano", **TINY)
    for shape in ((1, 1, 32, 32), (1, 3, 7, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="images"):
            net(noise(*shape))
    net = create_model("cvt_nano", **TINY, pos_embed=True, image_size=32)
    with pytest.raises(ValueError, match="position embedding"):
        net(noise(1, 3, 40, 32))
