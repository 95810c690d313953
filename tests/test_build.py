"""From keys to objects."""

import dataclasses
import shutil

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from src import build
from src.build import (
    accelerate,
    build_augmentation,
    build_model,
    build_preprocessing,
    open_checked,
    open_split,
    resolve_classes,
    uses_compiled,
)
from src.cli import parse
from src.config import AugmentConfig, Config, DataConfig, ModelConfig, RuntimeConfig
from src.data import open_source
from src.errors import UserError
from src.models.compiled import has_plain_convolutions
from tests.conftest import TINY
from tests.data.test_records import write_folder
from tests.processes import together
from tools.records.writer import Options, convert


def config(**groups):
    sizes = {"name": "cvt_nano", "image_size": 32, **TINY, **groups.pop("model", {})}
    groups.setdefault("data", DataConfig(source="digits"))
    return Config(model=ModelConfig(**sizes), **groups)


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


def test_classes_come_from_the_data():
    source = open_source("digits", None, "val")
    resolved = resolve_classes(config(model={"num_classes": None}), source)
    assert resolved.model.num_classes == 10
    assert resolved.data.class_names == list("0123456789")
    for other in (3, 12):
        with pytest.raises(UserError, match=f"model.num_classes {other}"):
            resolve_classes(config(model={"num_classes": other}), source)


def test_some_classes_keep_the_labels_that_a_run_gave_them():
    names = list("0123456789")
    for class_names, labels in ((None, [0, 1]), (names, [7, 2])):
        data = DataConfig(source="digits", classes=["7", "2"], class_names=class_names)
        source = open_split(config(data=data), "val")
        assert sorted(set(source.labels.tolist())) == sorted(labels)
        assert list(source.class_names) == (class_names or ["7", "2"])


def test_evaluation_on_part_of_the_training_images():
    """Whatever the seed, the same ones, which no training on few images sees either."""
    data = DataConfig(source="digits", val_from_train=100)
    whole = open_split(config(data=DataConfig(source="digits")), "train")
    held_out = open_split(config(data=data), "val")
    assert np.bincount(held_out.labels).tolist() == [10] * 10
    again = config(data=data)
    again.runtime.seed = 5
    assert open_split(again, "val").digest() == held_out.digest()
    rest = open_split(config(data=data), "train")
    assert len(rest) == len(whole) - 100
    seen = {rest[i][0].tobytes() for i in range(len(rest))}
    assert seen.isdisjoint(held_out[i][0].tobytes() for i in range(100))
    few = DataConfig(source="digits", val_from_train=100, train_images=len(rest))
    assert open_split(config(data=few), "train").digest() == rest.digest()


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
    with pytest.raises(UserError, match="the model has 8; "):
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


@pytest.fixture
def photos(tmp_path):
    """Four photographs of two classes in both splits, one of them cut off."""
    for split in ("train", "val"):
        for number in range(4):
            place = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20)).save(place)
        place.write_bytes(place.read_bytes()[:100])
    return tmp_path


def photo_config(folder, **keys):
    return Config(data=DataConfig(path=str(folder), broken_share=0.25, **keys))


def test_broken_images_are_skipped_in_training_and_stop_evaluation(photos, caplog):
    run = photos / "run"
    assert len(open_checked(photo_config(photos), "train", run=run)) == 3
    assert (run / "images.json").is_file()
    assert "left out: 1 of 4" in caplog.text and "train/b/3.jpg: cut off" in caplog.text
    with pytest.raises(UserError, match="1 of 4.*val/b/3.jpg: cut off.*data.broken skip"):
        open_checked(photo_config(photos), "val", run=run)
    with pytest.raises(UserError, match="1 of 4.*train/b/3.jpg"):
        open_checked(photo_config(photos, broken="stop"), "train", run=run)
    assert len(open_checked(photo_config(photos, broken="skip"), "val", run=run)) == 3
    strict = photo_config(photos, broken="skip")
    strict.data.broken_share = 0.2
    with pytest.raises(UserError, match="1 of 4.*data.broken_share .now 0.2"):
        open_checked(strict, "train", run=run)


def test_fewer_training_images_than_classes_are_refused():
    data = DataConfig(source="digits", train_images=9)
    with pytest.raises(UserError, match="train_images 9: digits .* has 10 classes; give one"):
        open_split(config(data=data), "train")


def test_photographs_that_exif_turns_are_said_to_become_bitmaps(photos):
    assert not open_checked(photo_config(photos), "train").inflated
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 20)).save(photos / "train/a/0.jpg", exif=exif)
    assert open_checked(photo_config(photos), "train").inflated


def test_the_validation_images_are_spoken_of_once(photos, caplog):
    (photos / "val" / "a" / "notes.txt").write_text("")
    open_checked(photo_config(photos), "train")
    assert "notes.txt" not in caplog.text
    open_checked(photo_config(photos, broken="skip"), "val")
    assert caplog.text.count("notes.txt") == 1


def test_where_the_index_is_kept(photos):
    open_checked(photo_config(photos), "train", run=photos / "run", keep=False)
    open_checked(photo_config(photos), "train")
    assert not (photos / "run").exists()
    named = photos / "shared" / "index.json"
    config = photo_config(photos, index=str(named))
    open_checked(config, "train", run=photos / "run", keep=False)
    assert not named.exists(), "an evaluation writes nothing that a found config.yaml names"
    open_checked(config, "train", run=photos / "run")
    assert named.is_file() and not (photos / "run").exists()


def test_a_class_without_a_readable_image_and_a_lone_class_are_refused(photos, caplog):
    for split in ("train", "val"):
        for path in (photos / split / "a").glob("*"):
            path.write_bytes(b"")
    keys = {"broken": "skip"}
    settings = photo_config(photos, **keys)
    settings.data.broken_share = 1.0
    with pytest.raises(UserError, match="train.: no image of a can be read"):
        open_checked(settings, "train")
    assert len(open_checked(settings, "val")) == 1
    assert "val): no image of a can be read" in caplog.text
    shutil.rmtree(photos / "train" / "a")
    shutil.rmtree(photos / "val" / "a")
    with pytest.raises(UserError, match=r"only one class \('b'\)"):
        open_checked(photo_config(photos), "train")


def test_a_class_without_training_images_is_told(tmp_path, caplog):
    for split, names in (("train", "ab"), ("val", "abc")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / "1.jpg")
    given = DataConfig(path=str(tmp_path), class_names=["a", "b", "c"])
    open_split(Config(data=given), "train")
    assert "(train): no images of 1 of 3 classes: c" in caplog.text
    given.classes = ["a", "b"]
    given.class_names = ["b", "c", "a"]
    assert open_split(Config(data=given), "train").labels.tolist() == [2, 0]
    shutil.rmtree(tmp_path / "train" / "b")
    with pytest.raises(UserError, match=r"train\): only one class \('a'\) has images; training"):
        open_split(
            Config(data=DataConfig(path=str(tmp_path), class_names=["a", "b", "c"])), "train"
        )


def test_a_class_without_training_records_is_refused(tmp_path):
    """As an empty class folder is; all its files were skipped when they were packed."""
    source = write_folder(tmp_path / "photos")
    for path in (source / "train" / "33").iterdir():
        path.write_bytes(b"")
    convert(source, tmp_path / "records", Options(skip_broken=True))
    data = DataConfig(source="mindrecord", path=str(tmp_path / "records"))
    with pytest.raises(UserError, match="no images of 1 of 3 classes: 33; add some, or name the"):
        open_split(Config(data=data), "train")
    data.classes = ["2", "10"]
    assert len(open_split(Config(data=data), "train")) == 14


WRONG_VALUES = {
    "data.mean .123.675, 116.28, 103.53.: .*pixels of 0..255, divide them by 255": {
        "data": {"mean": (123.675, 116.28, 103.53)}
    },
    "data.std .58.395, 57.12, 57.375.: .*divide them by 255": {
        "data": {"std": (58.395, 57.12, 57.375)}
    },
    "data.mean .-1, 0, 0.: each must be from 0 to 1": {"data": {"mean": (-1, 0, 0)}},
    "data.mean .nan": {"data": {"mean": (float("nan"), 0, 0)}},
    "data.std .0, 0.2, 0.2.: each must be from 1e-06 to 1": {"data": {"std": (0, 0.2, 0.2)}},
    "data.std .-0.2": {"data": {"std": (-0.2, 0.2, 0.2)}},
    "data.crop_ratio 1e-09": {"data": {"crop_ratio": 1e-9}},
    "augment.padding 1000: must be below the image size": {
        "augment": {"crop": "pad", "padding": 1000}
    },
    "augment.ratio .1e-09, 1.0.: must lie in": {"augment": {"ratio": (1e-9, 1.0)}},
    "augment.ratio .1.0, 1000000000.0.: must lie in": {"augment": {"ratio": (1.0, 1e9)}},
    "augment.scale .0.5, 0.1.": {"augment": {"scale": (0.5, 0.1)}},
    "augment.rand_augment rand-m9-n99": {"augment": {"rand_augment": "rand-m9-n99-inc1"}},
    "model.image_size 1000000: at most 8192": {"model": {"image_size": 1000000}},
    "data.class_names: names a more than once; name each class once": {
        "data": {"class_names": ["a", "b", "a"]}
    },
    "data.classes: is empty; name each": {"data": {"classes": []}},
    "val/a: 2 images, such as 0.jpg, but no class folders": {"data": {"val_folder": "val/a"}},
    "no folder 'valid' for the val split": {"data": {"val_folder": "valid"}},
    "val2/z: 'z' is none of the 2 known classes": {"data": {"val_folder": "val2"}},
}


@pytest.mark.parametrize("words", WRONG_VALUES)
def test_what_can_not_work_is_told_before_an_image_is_read(words, photos, monkeypatch):
    (photos / "val2" / "z").mkdir(parents=True)
    monkeypatch.setattr(build, "check_files", lambda *_, **__: pytest.fail("read the images"))
    settings = photo_config(photos)
    for group, keys in WRONG_VALUES[words].items():
        for key, value in keys.items():
            setattr(getattr(settings, group), key, value)
    with pytest.raises(UserError, match=words):
        open_checked(settings, "train")


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e9, 1e300, 1.7e308])
def test_every_alpha_mixes(alpha):
    for keys in ({"mixup": alpha}, {"cutmix": alpha}):
        mixing = build.build_mixing(config(augment=AugmentConfig(**keys)))
        drawn = np.array([mixing.draw((8, 8), 1, k) for k in range(50)])
        assert np.isfinite(drawn).all() and drawn.min() >= 0 and drawn[:, :2].max() <= 1


def test_classes_named_by_numbers():
    settings, _ = parse(
        ["--data.source=digits", "--data.classes", "[3,8]"], "", "", lambda parser: None
    )
    assert settings.data.classes == ["3", "8"]
    assert open_split(settings, "val").class_names == ("3", "8")


def test_unchecked_images_are_said_to_be(photos, caplog):
    assert len(open_checked(photo_config(photos, check_images=False), "val")) == 4
    assert "images are not checked" in caplog.text


def test_ranks_open_the_same_images(photos):
    """Each looks at its share of them."""
    first, second = together(
        2, lambda ranks: open_checked(photo_config(photos), "train", ranks, photos / "run")
    )
    assert len(second) == 3 and second.digest() == first.digest()

    def refuse(ranks):
        with pytest.raises(UserError, match="val/b/3.jpg: cut off"):
            open_checked(photo_config(photos), "val", ranks)

    together(2, refuse)


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
