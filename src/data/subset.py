"""Parts of a source: some classes, or some images of each."""

from __future__ import annotations

from collections.abc import Sequence

import mindspore.dataset as ds
import numpy as np

from src.data.base import Source, canonical
from src.errors import UserError


class Subset(Source):
    """Some items of another source.

    Args:
        source: the whole.
        indices: the items, int [N].
        labels: their labels here, int [N].
        class_names: names in the order of these labels.
    """

    def __init__(
        self, source: Source, indices: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
    ) -> None:
        super().__init__(labels, class_names, source.title)
        self.encoded = source.encoded
        self._source = source
        self._indices = indices

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int32]:
        return self._source[int(self._indices[index])][0], self.labels[index]

    def image_dataset(self, indices: np.ndarray, workers: int) -> ds.Dataset | None:
        """As the whole source reads them."""
        return self._source.image_dataset(self._indices[indices], workers)

    def digest_items(self, indices: np.ndarray, number: int, by_name: bool = False) -> int:
        """As the whole source does."""
        return self._source.digest_items(self._indices[indices], number, by_name)

    def describe(self, index: int) -> str:
        """The item as the whole source names it."""
        return self._source.describe(int(self._indices[index]))

    def file(self, index: int) -> str | None:
        """As of the whole source."""
        return self._source.file(int(self._indices[index]))


def only_classes(
    source: Source, names: Sequence[str], class_names: Sequence[str] | None = None
) -> Source:
    """The images of some classes.

    Args:
        source: the whole.
        names: the classes to keep.
        class_names: names in the order of the labels; by default `names`.

    Raises:
        UserError: a name that the source or `class_names` has not, or twice the same.
    """
    class_names = list(class_names or names)
    theirs = {canonical(name): label for label, name in enumerate(source.class_names)}
    ours = {canonical(name): label for label, name in enumerate(class_names)}
    new_labels = np.full(len(theirs), -1, np.int32)
    for name in map(canonical, names):
        if name not in theirs:
            raise UserError(f"data.classes: {source.title} has no class {name!r}")
        if name not in ours:
            raise UserError(f"data.classes: {name!r} is none of the run's classes {class_names}")
        new_labels[theirs[name]] = ours[name]
    if len(set(map(canonical, names))) < len(names):
        raise UserError(f"data.classes {list(names)}: names a class twice")
    labels = new_labels[source.labels]
    indices = np.flatnonzero(labels >= 0)
    return Subset(source, indices, labels[indices], class_names)


def balanced(source: Source, count: int, seed: int) -> Source:
    """`count` random images, as evenly from the classes as they allow; in the source's order.

    A larger count has all images of a smaller one, for the same seed.

    Raises:
        UserError: more than there are.
    """
    if count > len(source):
        raise UserError(f"data.train_images {count}: {source.title} has only {len(source)}")
    return _part(source, np.sort(_balanced_order(source, seed)[:count]))


def hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """The images of `balanced`, and before them all others.

    Raises:
        UserError: nothing would be left.
    """
    if count >= len(source):
        raise UserError(
            f"data.val_from_train {count}: {source.title} has only {len(source)}, and some must be "
            "left for training"
        )
    order = _balanced_order(source, seed)
    return _part(source, np.sort(order[count:])), _part(source, np.sort(order[:count]))


def _part(source: Source, indices: np.ndarray) -> Source:
    return Subset(source, indices, source.labels[indices], source.class_names)


def _balanced_order(source: Source, seed: int) -> np.ndarray:
    """Indices in a random order in which the classes take turns."""
    shuffled = np.random.default_rng([seed, 0xBA1A]).permutation(len(source))
    turn = np.empty(len(source), int)  # an image's place among the shuffled ones of its class
    seen = np.zeros(len(source.class_names), int)
    for index in shuffled:
        label = source.labels[index]
        turn[index] = seen[label]
        seen[label] += 1
    return shuffled[np.argsort(turn[shuffled], kind="stable")]
