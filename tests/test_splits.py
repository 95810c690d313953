"""Opening the images that a configuration names."""

import shutil

import numpy as np
import pytest
from PIL import Image

from src import splits
from src.cli import parse
from src.config import Config, DataConfig
from src.data import open_source
from src.errors import UserError
from src.splits import open_checked, open_split, resolve_classes
from tests.conftest import tiny_config as config
from tests.data.test_records import write_folder
from tests.processes import together
from tools.records.writer import Options, convert


def test_classes_come_from_the_data():
    source = open_source("digits", None, "val")
    resolved = resolve_classes(config(model={"num_classes": None}), source)
    assert resolved.model.num_classes == 10
    assert resolved.data.class_names == list("0123456789")
    for other in (3, 12):
        with pytest.raises(UserError, match=f"model.num_classes {other}"):
            resolve_classes(config(model={"num_classes": other}), source)


def test_paths_of_the_data_are_absolute(tmp_path, monkeypatch):
    """A run's config.yaml is read in other folders."""
    monkeypatch.chdir(tmp_path)
    data = DataConfig(path="photos", index="shared/index.json")
    resolved = resolve_classes(config(data=data), open_source("digits", None, "val")).data
    assert [resolved.path, resolved.index] == [
        str(tmp_path / "photos"),
        str(tmp_path / "shared/index.json"),
    ]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = DataConfig(path="~/photos", index="~/index.json")
    resolved = resolve_classes(config(data=data), open_source("digits", None, "val")).data
    assert [resolved.path, resolved.index] == [
        str(tmp_path / "home/photos"),
        str(tmp_path / "home/index.json"),
    ]


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


@pytest.mark.parametrize("more", [[], ["none of the data's"]])
def test_part_of_a_runs_classes_is_evaluated_on_its_held_out_images(more):
    data = {"source": "digits", "val_from_train": 100}
    held_out = open_split(config(data=DataConfig(**data)), "val")
    names = [*(str(digit) for digit in range(10)), *more]
    chosen = DataConfig(**data, class_names=names, classes=["7", "2"])
    part = open_split(config(data=chosen), "val")
    assert part.labels.tolist() == [n for n in held_out.labels.tolist() if n in (2, 7)]
    expected = {held_out[i][0].tobytes() for i in range(100) if held_out.labels[i] in (2, 7)}
    assert {part[i][0].tobytes() for i in range(20)} == expected


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


def test_photographs_that_exif_turns_are_said_to_become_bitmaps(photos, caplog):
    caplog.set_level("INFO", "cvt")
    assert not open_checked(photo_config(photos), "train").inflated
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 20)).save(photos / "train/a/0.jpg", exif=exif)
    assert open_checked(photo_config(photos), "train").inflated
    assert "images rotated as their EXIF data says: 1" in caplog.text


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


def add_images(folder, *names, count=1):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new("RGB", (20, 20)).save(folder / name / f"{number}.jpg")


@pytest.mark.parametrize(
    "classes, absent",
    [
        (None, "2 of 3 classes: b, c"),
        (["a", "b"], "1 of 2 classes: b"),
        (["b", "c"], "2 of 2 classes: b, c"),
    ],
)
def test_classes_without_evaluation_images_are_told(tmp_path, caplog, classes, absent):
    """With and without data.classes; a run's class names are known without a training folder."""
    add_images(tmp_path / "val", "a")
    data = DataConfig(path=str(tmp_path), classes=classes, class_names=["a", "b", "c"])
    source = open_split(Config(data=data), "val")
    assert source.class_names == ("a", "b", "c")
    assert source.labels.tolist() == [0] * ("a" in (classes or "a"))
    assert f"(val): no images of {absent}" in caplog.text
    data.classes = ["a", "bb"]
    with pytest.raises(UserError, match="data.classes: 'bb' is none of the run's classes, a, b, c"):
        open_split(Config(data=data), "val")
    data.class_names = None
    with pytest.raises(UserError, match="has no class 'bb'; it has a"):
        open_split(Config(data=data), "val")


def test_a_run_on_some_classes_needs_images_of_each_and_ignores_other_folders(tmp_path, caplog):
    add_images(tmp_path / "train", "a", "b", "c")
    add_images(tmp_path / "val", "a", "zz")
    data = DataConfig(path=str(tmp_path), classes=["b", "a"])
    assert open_split(Config(data=data), "train").labels.tolist() == [1, 0]
    assert open_split(Config(data=data), "val").labels.tolist() == [1]
    assert "imagefolder (val): no images of 1 of 2 classes: b" in caplog.text
    data.classes = ["a", "b", "d"]
    for split in ("train", "val"):
        with pytest.raises(UserError, match="has no class 'd'; it has a, b, c"):
            open_split(Config(data=data), split)
    data.class_names = ["a", "b", "d"]  # as in the config.yaml of a run that is resumed
    with pytest.raises(UserError, match=r"\(train\): no images of 1 of 3 classes: d; add some"):
        open_split(Config(data=data), "train")


def test_classes_without_held_out_images_are_told(tmp_path, caplog):
    add_images(tmp_path / "train", "a", "b", "c", count=3)
    data = DataConfig(path=str(tmp_path), val_from_train=2)
    open_split(Config(data=data), "train")
    assert not caplog.text
    assert len(open_split(Config(data=data), "val")) == 2
    assert "data.val_from_train 2 holds out no images of 1 of 3 classes: b" in caplog.text
    caplog.clear()
    data.val_from_train = 3
    open_split(Config(data=data), "val")
    data.classes, data.class_names = ["a", "b"], ["a", "b", "c"]
    open_split(Config(data=data), "val")
    assert not caplog.text


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
    "optimizer.betas .0.9, 0.99999999.: 1 in float32": {"optimizer": {"betas": (0.9, 0.99999999)}},
    "optimizer.eps 1e-50: 0 in float32": {"optimizer": {"eps": 1e-50}},
    "training.loss_scale 1e.39: must be from": {"training": {"loss_scale": 1e39}},
    "data.crop_ratio 1e-09": {"data": {"crop_ratio": 1e-9}},
    "augment.padding 1000: must be below the image size": {
        "augment": {"crop": "pad", "padding": 1000}
    },
    "augment.ratio .1e-09, 1.0.: must lie in": {"augment": {"ratio": (1e-9, 1.0)}},
    "augment.ratio .1.0, 1000000000.0.: must lie in": {"augment": {"ratio": (1.0, 1e9)}},
    "augment.scale .0.5, 0.1.": {"augment": {"scale": (0.5, 0.1)}},
    "augment.rand_augment rand-m9-n99": {"augment": {"rand_augment": "rand-m9-n99-inc1"}},
    "model.image_size 1000000: .* at most 4096": {"model": {"image_size": 1000000}},
    "image_size 4000: images would be resized to 4571 pixels": {"model": {"image_size": 4000}},
    "data.class_names: names a more than once; name each class once": {
        "data": {"class_names": ["a", "b", "a"]}
    },
    "data.classes: is empty; name each": {"data": {"classes": []}},
    r"val/a: images \(2\), such as 0.jpg, but no class folders": {"data": {"val_folder": "val/a"}},
    "no folder 'valid' for the val split": {"data": {"val_folder": "valid"}},
    "val2/z: 'z' is none of the 2 known classes": {"data": {"val_folder": "val2"}},
}


@pytest.mark.parametrize("words", WRONG_VALUES)
def test_what_can_not_work_is_told_before_an_image_is_read(words, photos, monkeypatch):
    (photos / "val2" / "z").mkdir(parents=True)
    monkeypatch.setattr(splits, "check_files", lambda *_, **__: pytest.fail("read the images"))
    settings = photo_config(photos)
    for group, keys in WRONG_VALUES[words].items():
        for key, value in keys.items():
            setattr(getattr(settings, group), key, value)
    with pytest.raises(UserError, match=words):
        open_checked(settings, "train")


def test_classes_named_by_numbers():
    settings, _ = parse(
        ["--data.source=digits", "--data.classes", "[3,8]"], "", "", lambda parser: None
    )
    assert settings.data.classes == ["3", "8"]
    assert open_split(settings, "val").class_names == ("3", "8")


def test_a_folder_that_held_out_images_replace_is_said_to_be_unused(photos, caplog):
    settings = photo_config(photos, val_from_train=2, val_folder="val2")
    assert len(open_split(settings, "val")) == 2
    assert "data.val_folder val2 is not used, because data.val_from_train 2" in caplog.text


@pytest.mark.parametrize(
    ("split", "held_out", "key"),
    [("val", None, "val_folder"), ("train", None, "train_folder"), ("val", 100, "train_folder")],
)
def test_a_folder_of_a_source_without_folders_is_said_to_be_unused(split, held_out, key, caplog):
    keys = {"source": "digits", "val_from_train": held_out}
    open_split(Config(data=DataConfig(**keys)), split)
    assert not caplog.text
    open_split(Config(data=DataConfig(**keys, **{key: "other"})), split)
    assert f"data.{key} other is not used, because data.source digits" in caplog.text


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
