"""ImageNet's classes and its three label protocols: the original labels, ReaL and V2.

ReaL is "Are we done with ImageNet?" (Beyer et al., 2020, arXiv 2006.07159), V2 "Do ImageNet
Classifiers Generalize to ImageNet?" (Recht et al., 2019, arXiv 1902.10811).
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.data.base import Source
from src.errors import UserError
from src.json_reader import read_json

logger = logging.getLogger("cvt")

CLASSES = 1000
REAL_IMAGES = 50_000
V2_IMAGES = 10_000
V2_FOLDERS = tuple(map(str, range(CLASSES)))
_SYNSET = re.compile(r"n\d{8}")
_VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


@functools.cache
def _classes() -> dict[str, str]:
    """Return the names of the 1,000 classes by their synsets, in the order of models' outputs.

    Both are timm 1.0's (Apache-2.0; the names are WordNet's), but for the two called "crane".
    """
    text = Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="ascii")
    return dict(line.split(" ", 1) for line in text.splitlines())


def synsets() -> tuple[str, ...]:
    """Return the 1,000 classes in the order of published models' outputs, which is sorted.

    torchvision 0.28 names its 1,000 outputs after these synsets in the same order.
    """
    return tuple(_classes())


def imagenet_names() -> list[str]:
    """Return the names of the 1,000 classes ("tench, Tinca tinca") in the order of `synsets`."""
    return list(_classes().values())


def find_class_order_fault(names: Sequence[str]) -> str | None:
    """Return how class names differ from ImageNet's order; None if they don't.

    Args:
        names: the class names in the order of the labels. ImageNet-V2's 0..999 are in order too.
    """
    names = tuple(names)
    if names in (synsets(), V2_FOLDERS):
        return None
    if len(names) != CLASSES:
        missing = [name for name in synsets() if name not in set(names)]
        unknown = [name for name in names if name not in set(synsets())]
        detail = [f"no {missing[0]}"] if missing else []
        detail += [f"{unknown[0]!r} is not an ImageNet class"] if unknown else []
        return f"{len(names)} classes, not {CLASSES}: {', '.join(detail)}"
    k = next(k for k in range(CLASSES) if names[k] != synsets()[k])
    known = (
        f", which is ImageNet's class {synsets().index(names[k])}" if names[k] in synsets() else ""
    )
    return f"class {k} is {names[k]}{known}; ImageNet's class {k} is {synsets()[k]}"


def check_class_order(
    source: Source, given: bool, labels: str = "val", outputs: int | None = None
) -> None:
    """Compare a split's classes with ImageNet's; in another order, accuracy would be near zero.

    Args:
        source: the split.
        given: whether `data.class_names` determines the order instead of the folders.
        labels: "real" and "v2" require ImageNet's classes. "val" only warns about other classes if
            they are given or are not synsets.
        outputs: the number of the network's outputs; None for the number of classes.

    Raises:
        UserError: the classes or their order differ; the message names the first difference.
    """
    names = source.class_names
    like_synsets = all(_SYNSET.fullmatch(name) for name in names)
    imagenet = len(names) == CLASSES or (outputs == CLASSES and like_synsets)
    if labels == "val" and not imagenet:
        return
    fault = find_class_order_fault(names)
    if fault is None:
        return
    fault = f"{source.title}: not ImageNet-1k's classes in their order: {fault}"
    if labels != "val":
        raise UserError(f"{fault}; data.labels {labels} requires that order")
    if not given and like_synsets:
        raise UserError(
            f"{fault}; correct the folders, or name the classes of your weights in "
            "the order of their outputs in data.class_names"
        )
    logger.warning("%s; correct only for weights that were trained in that order", fault)


def load_real(path: str | None) -> list[list[int]]:
    """Read ReaL's real.json: the labels of ILSVRC2012_val_00000001 to 00050000, in that order.

    Raises:
        UserError: the file is missing, or does not hold 50,000 lists of labels 0..999.
    """
    if not path:
        raise UserError("data.labels real: needs ReaL's real.json; give --data.labels_file FILE")
    remedy = "give real.json of github.com/google-research/reassessed-imagenet"
    try:
        content = read_json(Path(os.path.expanduser(path)))
    except OSError as error:
        raise UserError(f"data.labels_file {path}: {error.strerror}; {remedy}") from None
    except ValueError:
        raise UserError(f"data.labels_file {path}: not valid JSON; {remedy}") from None
    if not isinstance(content, list) or len(content) != REAL_IMAGES:
        found = f"{len(content)} entries" if isinstance(content, list) else type(content).__name__
        raise UserError(
            f"data.labels_file {path}: expected a list of {REAL_IMAGES} lists of labels, found "
            f"{found}; {remedy}"
        )
    for k, labels in enumerate(content):
        if not isinstance(labels, list) or not all(
            type(label) is int and 0 <= label < CLASSES for label in labels
        ):
            raise UserError(
                f"data.labels_file {path}: entry {k} is {str(labels)[:40]}, not a list of labels "
                f"0..{CLASSES - 1}; {remedy}"
            )
    return content


def apply_real_labels(
    source: Source, real: Sequence[Sequence[int]]
) -> tuple[Source, list[list[int]]]:
    """Find ReaL's labels of the validation images by their file names.

    Args:
        source: ImageNet's validation images, in class folders or MindRecord.
        real: the result of `load_real`.

    Returns:
        The images that have labels, and a list of labels for each.

    Raises:
        UserError: a file is not named ILSVRC2012_val_00000001 to 00050000 or occurs twice, or no
            image has a label.
    """
    numbers: dict[int, int] = {}
    for k in range(len(source)):
        found = _VAL_FILE.search(source.describe(k))
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(real):
            raise UserError(
                f"{source.describe(k)}: ReaL finds labels by the names ILSVRC2012_val_00000001 to "
                f"{len(real):08}.JPEG; keep the original names"
            )
        if number in numbers:
            raise UserError(
                f"{source.describe(k)}: ILSVRC2012_val_{number:08} occurs twice, also as "
                f"{source.describe(numbers[number])}; remove one"
            )
        numbers[number] = k
    kept = [(k, list(real[number - 1])) for number, k in numbers.items() if real[number - 1]]
    if not kept:
        raise UserError(f"{source.title}: none of its {len(source)} images has a label in ReaL")
    logger.info("ReaL: %d images counted, %d without a label left out", len(kept),
              len(source) - len(kept))  # fmt: skip
    _warn_if_partial(source, REAL_IMAGES, "ImageNet's validation set")
    return source.subset(np.array([k for k, _ in kept])), [labels for _, labels in kept]


def apply_v2_names(source: Source) -> Source:
    """Give V2's images the names of ImageNet's classes; folder k is class k."""
    _warn_if_partial(source, V2_IMAGES, "ImageNet-V2")
    return source.subset(np.arange(len(source)), class_names=synsets())


def _warn_if_partial(source: Source, images: int, name: str) -> None:
    """Warn if a split is incomplete, so that its results are not comparable with published ones."""
    if len(source) != images:
        logger.warning(
            "%s: %d images, but %s has %d: the results are not comparable with published ones",
            source.title, len(source), name, images,
        )  # fmt: skip
