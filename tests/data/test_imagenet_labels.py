"""ImageNet's classes and ReaL's labels, on made-up lists and names."""

import hashlib
import json
import logging

import numpy as np
import pytest

from src.data.base import FileSource
from src.data.imagenet_labels import (
    V2_FOLDERS,
    apply_real_labels,
    apply_v2_names,
    check_class_order,
    find_class_order_fault,
    imagenet_names,
    load_real,
    synsets,
)
from src.errors import UserError
from src.evaluation.metrics import Metrics


def source_of(numbers, labels=None, names=None):
    files = [f"/imagenet/val/n/ILSVRC2012_val_{number:08}.JPEG" for number in numbers]
    labels = np.zeros(len(files), np.int32) if labels is None else labels
    return FileSource(files, labels, synsets() if names is None else names, "made up")


def test_the_synsets_are_the_published_ones():
    """The checksum of timm's list, whose places were compared with torchvision's names."""
    text = "\n".join(synsets())
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
    )
    assert list(synsets()) == sorted(set(synsets())) and len(synsets()) == 1000
    assert (synsets()[0], synsets()[207], synsets()[999]) == (
        "n01440764", "n02099601", "n15075141",  # tench, golden retriever, toilet tissue
    )  # fmt: skip
    names = [name.split(",")[0] for name in imagenet_names()]
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    assert len(set(imagenet_names())) == 1000


def swapped():
    names = list(synsets())
    names[3], names[500] = names[500], names[3]
    return names


def test_the_first_difference_is_named():
    assert find_class_order_fault(synsets()) is None and find_class_order_fault(V2_FOLDERS) is None
    assert find_class_order_fault(swapped()) == (
        f"class 3 is {synsets()[500]}, which is ImageNet's class 500; "
        f"ImageNet's class 3 is {synsets()[3]}"
    )
    other = sorted([*synsets()[:7], "n09999999", *synsets()[8:]])
    assert find_class_order_fault(other).startswith(
        f"class 7 is {synsets()[8]}, which is ImageNet's class 8; "
    )
    assert find_class_order_fault(synsets()[1:]) == "999 classes, not 1000: no n01440764"
    assert find_class_order_fault([*synsets(), "lost+found"]) == (
        "1001 classes, not 1000: 'lost+found' is not an ImageNet class"
    )
    as_text = sorted(V2_FOLDERS)  # 0, 1, 10, 100, ...
    assert find_class_order_fault(as_text).startswith(
        "class 0 is 0; ImageNet's class 0 is n01440764"
    )


def test_what_a_mismatch_does(caplog):
    def check(names, *arguments):
        check_class_order(source_of([], names=names), *arguments)

    other = sorted([*synsets()[:7], "n09999999", *synsets()[8:]])
    words = [f"thing {k:03}" for k in range(1000)]
    with caplog.at_level(logging.WARNING):
        check(synsets(), False)
        check(("ant", "bee"), False)
        check(synsets()[:10], False, "val", 10)
        assert not caplog.records
        for names in (words, other, swapped()):
            check(names, True)  # a model that was trained so
        check(words, False)
        assert len(caplog.records) == 4 and "class 0 is thing 000" in caplog.text
    with pytest.raises(UserError, match="class 7 is .*data.class_names"):
        check(other, False)
    with pytest.raises(UserError, match="999 classes, not 1000: no n01440764"):
        check(synsets()[1:], False, "val", 1000)
    for labels in ("real", "v2"):
        for given in (False, True):
            with pytest.raises(UserError, match=f"class 3 is .* data.labels {labels} requires"):
                check(swapped(), given, labels)


@pytest.fixture(scope="module")
def real():
    """50,000 lists: 3,163 are empty, 42,164 have the original label; and those labels.

    Returns:
        lists, original labels int [50000].
    """
    rng = np.random.default_rng(0)
    original = rng.integers(0, 1000, 50_000)
    kinds = rng.permutation(np.repeat([0, 1, 2], [3163, 42_164, 4673]))
    lists = []
    for label, kind in zip(original.tolist(), kinds):
        others = [(label + int(step)) % 1000 for step in rng.integers(1, 1000, rng.integers(1, 4))]
        lists.append([[], [*others, label], others][kind])
    return lists, original


def test_real_divides_by_the_images_with_labels(real):
    """The original labels score 42,164 / 46,837 = 0.9002, as they do in the paper's lists."""
    lists, original = real
    order = np.random.default_rng(1).permutation(50_000)  # folders do not follow the numbers
    source, label_lists = apply_real_labels(source_of(order + 1, original[order]), lists)
    assert len(source) == len(label_lists) == 46_837
    metrics = Metrics()
    for start in range(0, len(source), 1000):
        labels = source.labels[start : start + 1000]
        logits = np.zeros((len(labels), 1000), np.float32)
        logits[np.arange(len(labels)), labels] = 5.0
        metrics.update(logits, label_lists[start : start + 1000])
    assert (metrics.images, metrics.correct1) == (46_837, 42_164)
    assert round(metrics.top1, 2) == 90.02


def test_real_goes_by_the_files_names(real, caplog):
    lists, _ = real
    full = [k + 1 for k, labels in enumerate(lists) if labels][:3]
    empty = lists.index([]) + 1
    with caplog.at_level(logging.INFO):
        source, found = apply_real_labels(source_of([full[2], empty, full[0]]), lists)
    assert found == [lists[full[2] - 1], lists[full[0] - 1]]
    assert [source.describe(k)[-13:-5] for k in range(2)] == [f"{full[2]:08}", f"{full[0]:08}"]
    assert "2 images counted, 1 without a label left out" in caplog.text
    assert "3 images, but ImageNet's validation set has 50000" in caplog.text
    for number in (0, 50_001):
        with pytest.raises(UserError, match="by the names ILSVRC2012_val_00000001 to 00050000"):
            apply_real_labels(source_of([number]), lists)
    with pytest.raises(UserError, match="keep the original names"):
        apply_real_labels(FileSource(["/a/1.jpg"], np.zeros(1), synsets(), "made up"), lists)
    with pytest.raises(UserError, match="occurs twice"):
        apply_real_labels(source_of([1, 2, 1]), lists)
    with pytest.raises(UserError, match="none of its 1 images"):
        apply_real_labels(source_of([empty]), lists)


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([[1]] * 49_999, "expected a list of 50000 lists of labels, found 49999 entries"),
        ({"1": [1]}, "found dict"),
        ([[1]] * 17 + [[1000]] + [[1]] * 49_982, r"entry 17 is \[1000\], not a list of labels"),
        ([[1]] * 49_999 + [[-1]], "entry 49999 is"),
        ([[1]] * 49_999 + [["1"]], "entry 49999 is"),
        ([[1]] * 49_999 + [[True]], "entry 49999 is"),
        ([3] * 50_000, "entry 0 is 3,"),
        ("[[1", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
    ids=["short", "mapping", "too high", "negative", "text", "bool", "flat", "cut off", "binary"],
)
def test_files_that_are_not_real_are_refused(content, complaint, tmp_path):
    path = tmp_path / "real.json"
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=complaint) as caught:
        load_real(str(path))
    assert "\n" not in str(caught.value) and "real.json" in str(caught.value)


def test_real_is_read_and_asked_for(real, tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps(real[0]))
    assert load_real(str(path)) == real[0]
    with pytest.raises(UserError, match="No such file"):
        load_real(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="labels_file /dev/zero: not valid JSON"):
        load_real("/dev/zero")
    with pytest.raises(UserError, match="--data.labels_file"):
        load_real(None)


def test_v2_gets_the_names_of_the_classes(caplog):
    source = apply_v2_names(source_of([1, 2], np.array([2, 10]), V2_FOLDERS))
    assert source.class_names == synsets() and source.labels.tolist() == [2, 10]
    assert "2 images, but ImageNet-V2 has 10000" in caplog.text
