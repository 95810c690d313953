"""Parts of a source."""

import numpy as np
import pytest

from src.data import ArraySource, balanced_subset, hold_out, select_classes
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
    rest, held_out = hold_out(source, 20, seed=1)
    assert np.bincount(held_out.labels).tolist() == [5, 5, 5, 5]
    assert numbers(held_out) == numbers(balanced_subset(source, 20, seed=1))
    assert sorted(numbers(rest) + numbers(held_out)) == list(range(100))
    assert numbers(rest) == sorted(numbers(rest))
    for i, number in enumerate(numbers(rest)):
        assert rest[i][1] == source.labels[number]
    with pytest.raises(UserError, match="val_from_train 100: .* only 100"):
        hold_out(source, 100, seed=1)
