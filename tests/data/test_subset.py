"""Parts of a source."""

import unicodedata

import numpy as np
import pytest

from src.data import ArraySource, balanced_subset, hold_out, select_classes
from src.data.base import FileSource
from src.data.subset import _shuffle_by_name
from src.errors import UserError


@pytest.fixture
def source():
    """100 images whose pixels hold their number; class sizes 50, 30, 15, 5."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [50, 30, 15, 5]))
    images = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    return ArraySource(images, labels, ["a", "b", "c", "d"], "letters")


def numbers(part):
    return [int(part[i][0][0, 0, 0]) for i in range(len(part))]


def test_classes_are_relabelled_in_the_order_given(source):
    part = select_classes(source, ["d", "b"])
    assert part.class_names == ("d", "b")
    assert sorted(np.bincount(part.labels).tolist()) == [5, 30]
    for i, number in enumerate(numbers(part)):
        assert part.class_names[part[i][1]] == source.class_names[source.labels[number]]
        assert part.describe(i) == source.describe(number)


def test_classes_that_are_not_there_are_refused(source):
    with pytest.raises(UserError, match="letters has no class 'e'"):
        select_classes(source, ["a", "e"])
    with pytest.raises(UserError, match="twice"):
        select_classes(source, ["a", "a"])
    with pytest.raises(UserError, match="'e' is none of the run's classes, a, b"):
        select_classes(source, ["a", "e"], ["a", "b"])


def test_known_classes_may_be_missing(source):
    part = select_classes(source, ["e", "d"], ["d", "e", "f"])
    assert part.class_names == ("d", "e", "f") and part.labels.tolist() == [0] * 5


def test_a_balanced_part_has_as_many_of_each_class_as_there_can_be(source):
    part = balanced_subset(source, 40, seed=1)
    counts = np.bincount(part.labels, minlength=4)
    assert counts.sum() == 40 and counts[3] == 5 and counts[:3].max() - counts[:3].min() <= 1
    assert numbers(part) == sorted(set(numbers(part)))
    assert numbers(part) == numbers(balanced_subset(source, 40, seed=1))
    assert numbers(part) != numbers(balanced_subset(source, 40, seed=2))
    assert set(numbers(part)) < set(numbers(balanced_subset(source, 60, seed=1)))
    with pytest.raises(UserError, match="only 100"):
        balanced_subset(source, 101, seed=1)


def test_held_out_images_are_balanced_and_not_trained_on(source):
    rest, held_out = hold_out(source, 16, seed=1)
    assert np.bincount(held_out.labels).tolist() == [4, 4, 4, 4]
    assert numbers(held_out) == numbers(balanced_subset(source, 16, seed=1))
    assert sorted(numbers(rest) + numbers(held_out)) == list(range(100))
    assert numbers(rest) == sorted(numbers(rest))
    for i, number in enumerate(numbers(rest)):
        assert rest[i][1] == source.labels[number]
    with pytest.raises(UserError, match="val_from_train 100: .* only 100"):
        hold_out(source, 100, seed=1)


def files(names, folder):
    classes = ("a", "b", "c")
    labels = np.array([classes.index(name[0]) for name in names], np.int32)
    return FileSource([str(folder / name) for name in names], labels, classes, "letters", folder)


def held_out_names(names, folder, count=30):
    _, held_out = hold_out(files(names, folder), count, seed=0)
    return {held_out.name(k) for k in range(len(held_out))}


def test_held_out_files_stay_where_others_come_and_go(tmp_path):
    """Else eval.py, later, would measure on images that were trained on."""
    names = [f"{c}/{k:03}.jpg" for c in "abc" for k in range(100)]
    before = held_out_names(names, tmp_path)
    trained = [name for name in names if name not in before]
    assert held_out_names([n for n in names if n not in trained[::50]], tmp_path) == before
    assert held_out_names(names, tmp_path / "moved") == before
    added = sorted([*names, "a/new.jpg", "b/new.jpg", "c/new.jpg"])
    assert len(held_out_names(added, tmp_path) & set(trained)) == 0
    removed = [name for name in names if name != min(before)]
    assert len(held_out_names(removed, tmp_path) & set(trained)) <= 1, "one in its place"


def test_held_out_files_do_not_depend_on_the_spelling_of_accents(tmp_path):
    """macOS stores names decomposed; a copy on Linux keeps them so."""
    names = [f"{c}/Müller é {k:03}.jpg" for c in "abc" for k in range(40)]
    decomposed = [unicodedata.normalize("NFD", name) for name in names]
    composed = {unicodedata.normalize("NFC", n) for n in held_out_names(decomposed, tmp_path)}
    assert composed == held_out_names(names, tmp_path)


def test_held_out_files_are_the_same_in_every_version(tmp_path):
    """Earlier runs have been trained on the others."""
    names = [*(f"{c}/{k}.jpg" for c in "ab" for k in range(8)), "a/é.jpg", "b/\udce9.jpg"]
    order = _shuffle_by_name(files(names, tmp_path), seed=3)
    assert order.tolist() == [17, 5, 0, 6, 7, 13, 1, 3, 11, 4, 2, 15, 16, 9, 8, 10, 12, 14]


def test_a_classs_only_image_is_not_held_out(tmp_path):
    names = [*(f"{c}/{k}.jpg" for c in "ab" for k in range(10)), "c/only.jpg"]
    words = "val_from_train 6: no image of c would be left for training in letters"
    with pytest.raises(UserError, match=words):
        hold_out(files(names, tmp_path), 6, seed=0)
