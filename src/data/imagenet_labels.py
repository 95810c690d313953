"""ImageNet's classes and the labels of its three protocols: the original ones, ReaL and V2.

ReaL is "Are we done with ImageNet?" (Beyer et al., 2020, arXiv 2006.07159), V2 "Do ImageNet
Classifiers Generalize to ImageNet?" (Recht et al., 2019, arXiv 1902.10811).
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.data.base import Source
from src.data.subset import Subset
from src.errors import UserError

_log = logging.getLogger("cvt")

CLASSES = 1000
REAL_IMAGES = 50_000
V2_IMAGES = 10_000
V2_FOLDERS = tuple(map(str, range(CLASSES)))
_SYNSET = re.compile(r"n\d{8}")
_VAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


@functools.cache
def synsets() -> tuple[str, ...]:
    """The 1,000 classes in the order of published models' outputs, which is the sorted one.

    The list is timm 1.0's imagenet_synsets.txt (Apache-2.0); the names that torchvision 0.28 gives
    its 1,000 outputs are those of these synsets, in this order.
    """
    path = Path(__file__).with_name("imagenet_synsets.txt")
    return tuple(path.read_text(encoding="ascii").split())


def class_order_fault(names: Sequence[str]) -> str | None:
    """The first class that is not ImageNet's at its place; None where there is none.

    Args:
        names: of the classes in the order of the labels. ImageNet-V2's 0..999 are in order too.
    """
    names = tuple(names)
    if names in (synsets(), V2_FOLDERS):
        return None
    if len(names) != CLASSES:
        missing = [name for name in synsets() if name not in set(names)]
        strange = [name for name in names if name not in set(synsets())]
        detail = [f"no {missing[0]}"] if missing else []
        detail += [f"{strange[0]!r} is none of its"] if strange else []
        return f"{len(names)} classes, not {CLASSES}: {', '.join(detail)}"
    k = next(k for k in range(CLASSES) if names[k] != synsets()[k])
    known = f", which is its {synsets().index(names[k])}" if names[k] in synsets() else ""
    return f"class {k} is {names[k]}{known}, ImageNet's is {synsets()[k]}"


def check_class_order(
    source: Source, given: bool, labels: str = "val", outputs: int | None = None
) -> None:
    """Compare 1,000 classes with ImageNet's: evaluated in another order, accuracy is near zero.

    Args:
        source: the split.
        given: whether `data.class_names`, and not the folders, says which output a class is.
        labels: with "real" and "v2" the classes have to be ImageNet's; with "val" others pass
            where they are given, and where they are no synsets, with a warning.
        outputs: of the network; None are as many as the classes.

    Raises:
        UserError: the classes are others or in another order; names the first difference.
    """
    names = source.class_names
    like_synsets = all(_SYNSET.fullmatch(name) for name in names)
    imagenet = len(names) == CLASSES or (outputs == CLASSES and like_synsets)
    if labels == "val" and not imagenet:
        return
    fault = class_order_fault(names)
    if fault is None:
        return
    fault = f"{source.title}: not ImageNet-1k's classes in their order: {fault}"
    if labels != "val":
        raise UserError(f"{fault}; data.labels {labels} counts by that order")
    if not given and like_synsets:
        raise UserError(
            f"{fault}; correct the folders or, for weights of just these classes, name them in "
            "the order of the model's outputs in data.class_names"
        )
    _log.warning("%s; right only for weights that were trained in that order", fault)


def load_real(path: str | None) -> list[list[int]]:
    """Read ReaL's real.json: the labels of ILSVRC2012_val_00000001 to 00050000, in that order.

    Raises:
        UserError: there is no file, or it is not 50,000 lists of labels 0..999.
    """
    if not path:
        raise UserError("data.labels real: needs ReaL's real.json; give --data.labels_file FILE")
    remedy = "give real.json of github.com/google-research/reassessed-imagenet"
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data.labels_file {path}: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError):
        raise UserError(f"data.labels_file {path}: no valid JSON; {remedy}") from None
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


def with_real(source: Source, real: Sequence[Sequence[int]]) -> tuple[Source, list[list[int]]]:
    """The images that ReaL has labels for, by their files' names, and those labels.

    Args:
        source: ImageNet's validation images, in class folders or MindRecord.
        real: as of `load_real`.

    Returns:
        The images without those whose list is empty, and a list of labels for each.

    Raises:
        UserError: a file that isn't named ILSVRC2012_val_00000001 to 00050000, one that comes
            twice, or no image with a label.
    """
    numbers: dict[int, int] = {}
    for k in range(len(source)):
        found = _VAL_FILE.search(source.describe(k))
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(real):
            raise UserError(
                f"{source.describe(k)}: ReaL finds its labels by names ILSVRC2012_val_00000001 to "
                f"{len(real):08}.JPEG; keep the files' own names"
            )
        if number in numbers:
            raise UserError(
                f"{source.describe(k)}: ILSVRC2012_val_{number:08} comes twice, also as "
                f"{source.describe(numbers[number])}; remove one"
            )
        numbers[number] = k
    kept = [(k, list(real[number - 1])) for number, k in numbers.items() if real[number - 1]]
    if not kept:
        raise UserError(f"{source.title}: none of its {len(source)} images has a label in ReaL")
    _log.info("ReaL: %d images counted, %d without a label left out", len(kept),
              len(source) - len(kept))  # fmt: skip
    expect(source, REAL_IMAGES, "ImageNet's validation images")
    indices = np.array([k for k, _ in kept])
    subset = Subset(source, indices, source.labels[indices], source.class_names)
    return subset, [labels for _, labels in kept]


def with_v2(source: Source) -> Source:
    """V2's images under the names of ImageNet's classes; its folder k is class k."""
    expect(source, V2_IMAGES, "ImageNet-V2")
    return Subset(source, np.arange(len(source)), source.labels, synsets())


def expect(source: Source, images: int, what: str) -> None:
    """Warn where a split is only a part, whose figures compare with nobody else's."""
    if len(source) != images:
        _log.warning(
            "%s: %d images, %s are %d: the figures are those of this part",
            source.title, len(source), what, images,
        )  # fmt: skip
