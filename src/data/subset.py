"""Choose the images of a split: by class, by number, or those that can be read."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections.abc import Sequence

import numpy as np

from src.data.base import Source, normalize_name
from src.errors import UserError, join_names

logger = logging.getLogger("cvt")

_MAX_NAMED = 5  # broken images that a message names


def select_classes(
    source: Source, names: Sequence[str], class_names: Sequence[str] | None = None
) -> Source:
    """Select the images of some classes.

    Args:
        source: the split.
        names: the classes to keep.
        class_names: names in the order of the labels, of which the source may lack some; by default
            `names`, of which it may not.

    Raises:
        UserError: a name is unknown or occurs twice.
    """
    may_lack = bool(class_names)
    class_names = list(class_names or names)
    old_labels = {normalize_name(name): label for label, name in enumerate(source.class_names)}
    new_labels = {normalize_name(name): label for label, name in enumerate(class_names)}
    label_map = np.full(len(old_labels), -1, np.int32)
    for name in map(normalize_name, names):
        if name not in new_labels:
            raise UserError(
                f"data.classes: {name!r} is none of the run's classes, {join_names(class_names)}"
            )
        if name in old_labels:
            label_map[old_labels[name]] = new_labels[name]
        elif not may_lack:
            raise UserError(
                f"data.classes: {source.title} has no class {name!r}; it has "
                f"{join_names(source.class_names)}"
            )
    if len(set(map(normalize_name, names))) < len(names):
        raise UserError(f"data.classes {join_names(names)}: names a class twice; remove one")
    labels = label_map[source.labels]
    indices = np.flatnonzero(labels >= 0)
    return source.subset(indices, labels[indices], class_names)


def balanced_subset(source: Source, count: int, seed: int) -> Source:
    """Select `count` random images, as evenly over the classes as possible, in the source's order.

    With the same seed, a larger selection contains every smaller one.

    Raises:
        UserError: the source has fewer images.
    """
    if count > len(source):
        raise UserError(
            f"data.train_images {count}: {source.title} has only {len(source)} images; lower it"
        )
    return source.subset(np.sort(_balanced_order(source, seed)[:count]))


def hold_out(source: Source, count: int, seed: int) -> tuple[Source, Source]:
    """Split off random images, as evenly over the classes as possible.

    Files are chosen by their names, so that one more or less hardly changes the choice: else a
    later evaluation would measure on images that were trained on.

    Returns:
        The other images, and those held out.

    Raises:
        UserError: no image, or none of a class, would be left for training.
    """
    if count >= len(source):
        raise UserError(
            f"data.val_from_train {count}: {source.title} has only {len(source)}, and some must be "
            "left for training"
        )
    if len(source) and source.name(0) is not None:
        order = _alternate_classes(source, _shuffle_by_name(source, seed))
    else:
        order = _balanced_order(source, seed)
    rest = source.subset(np.sort(order[count:]))
    lost = missing_classes(source, rest)
    if lost:
        raise UserError(
            f"data.val_from_train {count}: no image of {join_names(lost)} would be left for "
            f"training in {source.title}; add images, or lower it"
        )
    return rest, source.subset(np.sort(order[:count]))


def _balanced_order(source: Source, seed: int) -> np.ndarray:
    """Return the indices in a random order in which the classes alternate."""
    shuffled = np.random.default_rng([seed, 0xBA1A]).permutation(len(source))
    return _alternate_classes(source, shuffled)


def _shuffle_by_name(source: Source, seed: int) -> np.ndarray:
    """Return the indices in a random order, in which each pair of files has a fixed order.

    Names count in Unicode's composed form (NFC): macOS stores them decomposed.
    """

    def key(index: int) -> bytes:
        name = unicodedata.normalize("NFC", source.name(index))
        return hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()

    return np.array(sorted(range(len(source)), key=key))


def _alternate_classes(source: Source, shuffled: np.ndarray) -> np.ndarray:
    """Return the indices in this order within each class, with the classes taking turns."""
    turn = np.empty(len(source), int)  # an image's place among the shuffled ones of its class
    seen = np.zeros(len(source.class_names), int)
    for index in shuffled:
        label = source.labels[index]
        turn[index] = seen[label]
        seen[label] += 1
    return shuffled[np.argsort(turn[shuffled], kind="stable")]


def drop_broken(source: Source, faults: dict[int, str], max_fraction: float, remedy: str) -> Source:
    """Drop a split's broken images and log them.

    Args:
        source: the split.
        faults: the fault of each broken image, by index.
        max_fraction: the fraction of images that may be broken; 0 allows none.
        remedy: what the user can do, for the message.

    Raises:
        UserError: more images are broken, or all of them.
    """
    if not faults:
        return source
    named = "; ".join(f"{source.describe(k)}: {faults[k]}" for k in sorted(faults)[:_MAX_NAMED])
    if len(faults) > _MAX_NAMED:
        named += f"; and {len(faults) - _MAX_NAMED} more"
    count = f"{len(faults)} of {len(source)} images of {source.title} can't be read"
    if len(faults) > max_fraction * len(source) or len(faults) == len(source):
        raise UserError(f"{count}: {named}; remove or replace them, {remedy}")
    logger.warning("left out: %s (%.2f %%): %s", count, 100 * len(faults) / len(source), named)
    return source.subset(np.setdiff1d(np.arange(len(source)), list(faults)))


def missing_classes(source: Source, kept: Source) -> list[str]:
    """Return the names of the classes that have images in `source` and none in `kept`."""
    return [source.class_names[k] for k in np.setdiff1d(source.labels, kept.labels)]
