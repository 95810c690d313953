"""From keys to networks, preprocessing and augmentation."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest

from src import build
from src.build import (
    accelerate,
    build_augmentation,
    build_for_weights,
    build_model,
    build_preprocessing,
    uses_compiled,
)
from src.config import AugmentConfig, Config, DataConfig, ModelConfig, RuntimeConfig
from src.errors import UserError
from src.models.compiled import has_plain_convolutions
from src.weights import load_weights, save_weights
from tests.conftest import tiny_config as config


def test_every_model_key_reaches_the_network():
    """Each value differs from the variant's own; the network must show it."""
    keys = {
        "embed_dims": [8, 16, 24],
        "depths": [2, 1, 1],
        "num_heads": [2, 4, 8],
        "mlp_ratio": 2.0,
        "kv_stride": 1,
        "qkv_projection": "avg",
        "cls_token": False,
        "pos_embed": True,
        "patch_embed": "patch",
        "drop_path_rate": 0.25,
        "drop_rate": 0.125,
        "num_classes": 7,
    }
    assert keys.keys() | {"name", "image_size"} == {f.name for f in dataclasses.fields(ModelConfig)}
    net = build_model(config(model={**keys, "image_size": [32, 48]}))
    block = net.stage0.blocks[1]
    shapes = {p.name: p.shape for p in net.get_parameters()}
    assert shapes["stage2.patch_embed.norm.gamma"] == (24,)
    assert (block.attn.num_heads, block.mlp.fc1.out_channels) == (2, 16)
    assert (block.attn.pool_kv.stride, block.drop_path1.rate) == (1, 0.25)
    assert block.mlp.drop1.rate == 0.125
    assert "stage2.cls_token" not in shapes and shapes["stage0.pos_embed"] == (1, 16 * 24, 8)
    assert net.stage0.patch_embed.proj.kernel_size == (2, 2) and shapes["head.bias"] == (7,)


@pytest.mark.parametrize(
    "size, ratio, resize",
    [(224, 0.875, 256), (384, None, None), ([192, 256], 0.875, (219, 292)), (32, 1.0, 32)],
)
def test_evaluation_resizes_as_configured(size, ratio, resize):
    data = DataConfig(source="digits", crop_ratio=ratio)
    preprocessing = build_preprocessing(config(model={"image_size": size}, data=data))
    assert preprocessing.resize == resize
    assert preprocessing.image_size == ((size, size) if isinstance(size, int) else tuple(size))


def test_augmentation_follows_the_keys():
    keys = {"rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.2, "erasing_prob": 0.25}
    augment = AugmentConfig(crop="pad", padding=2, hflip=0.0, repeats=3, **keys)
    operations = build_augmentation(config(augment=augment), encoded=True)
    assert [type(operation).__name__ for operation in operations] == (
        ["Decode", "Resize", "PadCrop", "RandAugment", "RandomColorAdjust", "Erase"]
    )


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(UserError, match="data.crop_ratio"):
        build_preprocessing(config(data=DataConfig(source="digits", crop_ratio=1.5)))


def test_flash_attention_is_chosen_by_one_key(monkeypatch):
    """Only on Ascend, only in half precision, only with heads that fit; never for deployment."""
    asked = config(runtime=RuntimeConfig(precision="float16", flash_attention=True))
    with pytest.raises(UserError, match="runs on (CPU|GPU); leave it out"):
        build_model(asked)
    monkeypatch.setattr(build, "current_device", lambda: "Ascend")
    with pytest.raises(UserError, match="runtime.flash_attention: .* the model has 8; "):
        build_model(asked)
    sizes = {"model": {"embed_dims": (16, 32, 64)}}
    full = config(runtime=RuntimeConfig(flash_attention=True), **sizes)
    with pytest.raises(UserError, match="no float32; set runtime.precision"):
        build_model(full)
    asked = config(runtime=asked.runtime, **sizes)
    for settings, expected in ((asked, True), (build.without_flash_attention(asked), False)):
        net = build_model(settings)
        blocks = [*net.stage0.blocks, *net.stage1.blocks, *net.stage2.blocks]
        assert {block.attn.attend.flash for block in blocks} == {expected}


def test_a_network_without_depthwise_convolutions_has_no_shifts():
    net = build_model(config(model={"qkv_projection": "avg"}))
    with pytest.raises(UserError, match="runtime.depthwise shifts: .*no convolutional projection"):
        accelerate(net, RuntimeConfig(depthwise="shifts"))


def test_a_network_for_weights_initialises_none_of_them(tmp_path, monkeypatch):
    """Initialising takes seconds for the largest variants; what no file sets is not left empty."""
    trained = build_model(config())
    save_weights(trained, tmp_path / "all.ckpt")
    with monkeypatch.context() as patch:
        for kind in ("Normal", "Uniform", "HeUniform"):
            patch.setattr(f"mindspore.common.initializer.{kind}._initialize", None)
        net = build_for_weights(config())
        load_weights(net, tmp_path / "all.ckpt")
    for loaded, expected in zip(net.get_parameters(), trained.get_parameters(), strict=True):
        np.testing.assert_array_equal(loaded.asnumpy(), expected.asnumpy())
    other = build_for_weights(config(model={"num_classes": 7}))
    load_weights(other, tmp_path / "all.ckpt", new_head=True)
    assert 0.01 < other.head.weight.asnumpy().std() < 0.03


def test_float16_computes_in_float16_but_for_norms_softmax_and_output():
    net = build_model(config()).set_train(False)
    half = build_model(config(runtime=RuntimeConfig(precision="float16"))).set_train(False)
    for target, source in zip(half.get_parameters(), net.get_parameters()):
        target.set_data(source.copy())
    assert all(p.dtype == ms.float32 for p in half.get_parameters())
    ms.set_context(mode=ms.PYNATIVE_MODE)
    seen = {}

    def watch(name):
        return lambda cell, inputs, output: seen.__setitem__(name, output.dtype)

    half.stage0.blocks[0].mlp.fc1.register_forward_hook(watch("Linear"))
    half.stage0.blocks[0].norm1.register_forward_hook(watch("LayerNorm"))
    half.stage0.blocks[0].attn.conv_proj_q.bn.register_forward_hook(watch("BatchNorm"))
    images = ms.Tensor(np.random.default_rng(0).standard_normal((2, 3, 32, 32)), ms.float32)
    logits, expected = half(images), net(images)
    assert seen == {"Linear": ms.float16, "LayerNorm": ms.float32, "BatchNorm": ms.float32}
    assert logits.dtype == ms.float32
    difference = np.abs(logits.asnumpy() - expected.asnumpy()).max()
    assert 0 < difference < 5e-3


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e9, 1e300, 1.7e308])
def test_every_alpha_mixes(alpha):
    for keys in ({"mixup": alpha}, {"cutmix": alpha}):
        mixing = build.build_mixing(config(augment=AugmentConfig(**keys)))
        drawn = np.array([mixing.draw((8, 8), 1, k) for k in range(50)])
        assert np.isfinite(drawn).all() and drawn.min() >= 0 and drawn[:, :2].max() <= 1


def test_compiled_operators_are_used_where_they_can_be(built, monkeypatch, caplog):
    caplog.set_level("INFO", "cvt")
    monkeypatch.setattr(build, "mindspore_version", lambda: (2, 8))
    assert uses_compiled(RuntimeConfig()) and uses_compiled(RuntimeConfig(compiled_ops="always"))
    assert not uses_compiled(RuntimeConfig(compiled_ops="never"))
    assert not uses_compiled(RuntimeConfig(precision="float16"))
    assert not has_plain_convolutions(accelerate(build_model(config()), RuntimeConfig()))
    never = RuntimeConfig(compiled_ops="never")
    assert has_plain_convolutions(accelerate(build_model(config()), never))
    assert not caplog.records
    with pytest.raises(UserError, match="are for the CPU in float32, .* CPU in float16"):
        uses_compiled(RuntimeConfig(compiled_ops="always", precision="float16"))


def test_without_a_compiler_the_log_says_so(monkeypatch, caplog):
    caplog.set_level("INFO", "cvt")
    monkeypatch.setattr("src.kernels.library.COMPILERS", ("no-such-compiler",))
    net = accelerate(build_model(config()), RuntimeConfig())
    assert has_plain_convolutions(net)
    assert "running without compiled operators, which is slower: no C++ compiler" in caplog.text
    with pytest.raises(UserError, match="compiled_ops always: no C.. compiler found"):
        uses_compiled(RuntimeConfig(compiled_ops="always"))


@pytest.mark.parametrize(("name", "warned"), [("cvt_nano", False), ("resnet_nano", True)])
def test_a_mindspore_with_slow_convolutions_is_named(built, monkeypatch, caplog, name, warned):
    """In one line, and only where a network has convolutions left that meet it."""
    monkeypatch.setattr(build, "mindspore_version", lambda: (2, 10))
    net = build_model(Config(model=ModelConfig(name=name, image_size=32, num_classes=10)))
    accelerate(net, RuntimeConfig())
    assert ("100 times slower than 2.8" in caplog.text) == warned
    accelerate(build_model(config()), RuntimeConfig(compiled_ops="never"))
    assert "100 times slower than 2.8" in caplog.text
