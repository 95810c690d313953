"""Data sets are written to a temporary folder byte by byte and read back; faults must be named."""

import functools
import logging
import os

import numpy as np
import pytest
from PIL import Image

from src.data.base import ArraySource
from src.data.sources import open_source
from src.errors import UserError


def refused(name, path, split="train", match="", **keywords):
    """The source is refused in one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        open_source(name, str(path), split, **keywords)
    assert "\n" not in str(caught.value)


# imagefolder


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, shade, shade)).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for shade, name in enumerate(("ant", "bee", "cat")):
            image(tmp_path / split / name / "1.png", shade)
            image(tmp_path / split / name / "deep" / "2.JPEG", shade)
    return tmp_path


def test_imagefolder_items(folder):
    source = open_source("imagefolder", str(folder), "train")
    assert source.encoded and len(source) == 6
    assert source.class_names == ("ant", "bee", "cat")
    assert source.labels.dtype == np.int32 and source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    content, label = source[3]
    path = folder / "train" / "bee" / "deep" / "2.JPEG"
    assert source.describe(3) == str(path)
    assert content.dtype == np.uint8 and content.tobytes() == path.read_bytes()
    assert label == 1 and label.dtype == np.int32


def test_val_labels_follow_the_train_folders(folder):
    for name in ("1.png", "deep/2.JPEG"):
        (folder / "val" / "ant" / name).unlink()
    (folder / "val" / "ant" / "deep").rmdir()
    (folder / "val" / "ant").rmdir()
    source = open_source("imagefolder", str(folder), "val")
    assert source.class_names == ("ant", "bee", "cat") and source.labels.tolist() == [1, 1, 2, 2]


def test_labels_follow_the_given_names(folder):
    names = ("cat", "zebra", "ant", "bee")
    source = open_source("imagefolder", str(folder), "val", names)
    assert source.class_names == names and source.labels.tolist() == [2, 2, 3, 3, 0, 0]
    refused("imagefolder", folder, match="'cat' is none of", class_names=("ant", "bee"))


def test_integer_class_names_sort_as_integers(tmp_path):
    for name in range(12):
        image(tmp_path / "val" / str(name) / "x.png")
    source = open_source("imagefolder", str(tmp_path), "val")
    assert source.class_names == tuple(map(str, range(12)))
    assert all(os.sep + str(source[i][1]) + os.sep in source.describe(i) for i in range(12))


def test_folder_names_can_be_chosen(folder):
    here = open_source("imagefolder", str(folder / "val"), "val", val_folder=".")
    assert len(here) == 6 and here.class_names == ("ant", "bee", "cat")
    (folder / "val").rename(folder / "test")
    refused("imagefolder", folder, "val", match="no folder 'val' .* there is test, train;")
    for given in ("test/2", str(folder / "2")):
        refused("imagefolder", folder, "val", match=f"no folder '{given}' for", val_folder=given)
    assert len(open_source("imagefolder", str(folder), "val", val_folder="test")) == 6


def test_one_folder_of_classes_is_told_its_options(folder):
    """Most people's photographs lie in class folders, without train and val."""
    photos = folder / "train"
    words = "if these are the classes, add "
    refused("imagefolder", photos, match=words + "--data.train_folder . --data.val_from_train N$")
    with pytest.raises(UserError, match=words + "--data.val_from_train N$"):
        open_source("imagefolder", str(photos), "val", train_folder=".")
    names = ("ant", "bee", "cat")
    refused(
        "imagefolder", photos, "val", class_names=names,
        match=words + "--data.val_folder .$",
    )  # fmt: skip


def test_a_test_set_inside_the_training_folder_can_be_evaluated(folder):
    names = ("ant", "bee", "cat")
    open_val = functools.partial(open_source, "imagefolder", str(folder), "val", train_folder=".")
    assert len(open_val(names)) == 6
    with pytest.raises(UserError, match="contains the other split's folder"):
        open_val()  # the class names would be "train" and "val"


def test_folders_of_classes_that_are_not_selected_are_not_read(folder):
    for split in ("train", "val"):
        (folder / split / "empty").mkdir()
    image(folder / "val" / "unknown" / "1.png")
    (folder / "val" / "ant" / "link").symlink_to("../unknown")
    for split in ("train", "val"):
        source = open_source("imagefolder", str(folder), split, selected=["bee", "ant"])
        assert source.class_names == ("ant", "bee", "cat", "empty")
        assert source.labels.tolist() == [0, 0, 1, 1]
    source = open_source("imagefolder", str(folder), "val", ("dog", "bee"), selected=["bee"])
    assert source.class_names == ("dog", "bee") and source.labels.tolist() == [1, 1]


def test_other_files_are_counted_hidden_ones_ignored(folder, caplog):
    (folder / "train" / "ant" / "notes.txt").write_text("x")
    (folder / "train" / "list.csv").write_text("x")
    (folder / "train" / "ant" / ".DS_Store").write_text("x")
    image(folder / "train" / ".cache" / "1.png")
    with caplog.at_level(logging.WARNING):
        source = open_source("imagefolder", str(folder), "train")
    assert len(source) == 6 and source.class_names == ("ant", "bee", "cat")
    assert len(caplog.records) == 1 and "left out files (2)" in caplog.text


def test_imagefolder_faults(folder, tmp_path):
    refused("imagefolder", tmp_path / "nowhere", match="nowhere: no such folder")
    refused("imagefolder", "", match="needs a folder")
    (folder / "train" / "dog").mkdir()
    refused("imagefolder", folder, match="dog: no image in this class folder")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    refused("imagefolder", tmp_path / "empty", match="train: no class folders")


def test_unknown_source_and_bad_arrays():
    refused("imagenet", "x", match="choose one of digits, imagefolder")
    with pytest.raises(ValueError):
        ArraySource(np.zeros((2, 4, 4), np.float32), np.zeros(2), ("a",), "floats")
    with pytest.raises(ValueError):
        ArraySource(np.zeros((2, 4, 4), np.uint8), np.zeros(3), ("a",), "short")
