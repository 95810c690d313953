"""Read and validate the description, F.json, that export.py writes beside an exported file F.

The file may be untrusted: its sizes determine how much memory is allocated, its names are shown.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from src.build import MAX_SIDE
from src.data import Preprocessing
from src.errors import UserError
from src.files import sha256_of
from src.json_reader import read_json
from src.weights.origin import MAX_BYTES, check_class_names

_MAX_FLOATS = 1 << 26  # in a batch: 256 MiB, 445 images of 224 px


def read_description(path: str | Path) -> dict[str, Any]:
    """Read the description beside an exported file.

    Args:
        path: of the model, not of the .json.

    Returns:
        The content, with `preprocessing` as `Preprocessing`, `class_names` as a list (empty if
        unknown) and `input_shape` as (batch or None, 3, H, W).

    Raises:
        UserError: the description is missing, invalid or another file's.
    """
    beside = Path(f"{path}.json")
    try:
        description = read_json(beside, MAX_BYTES)
        if not isinstance(description, dict):
            raise ValueError("not a JSON object")
        description.update(_validate(description))
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(
            f"{beside}: {reason}; keep the .json of export.py beside the model, readable"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"{beside}: not what export.py wrote ({reason[:200]}); export again"
        ) from None
    digest = description.get("file_sha256")  # files of earlier versions have none
    if digest is not None and Path(path).is_file() and sha256_of(path) != digest:
        raise UserError(  # whose classes may be in another order
            f"{path}: not the file that {beside.name} describes: another export's, or damaged; "
            "copy both files of export.py again. If you changed the model yourself, remove "
            "file_sha256 from the .json"
        )
    return description


def check_readable(shape: list, preprocessing: Preprocessing, class_names: list | None) -> None:
    """Check before an export that `read_description` will accept what describes the file.

    Raises:
        UserError: the model, its images or a batch of them are beyond the limits.
    """
    limit = _MAX_FLOATS // math.prod(shape[1:])
    if limit and shape[0] is not None and shape[0] > limit:
        raise UserError(
            f"--batch_size {shape[0]}: at most {limit} images of this size; lower it or use dynamic"
        )
    values = preprocessing.to_dict()
    description = {"input_shape": shape, "preprocessing": values, "class_names": class_names}
    try:
        _validate(json.loads(json.dumps(description)))
    except ValueError as error:
        raise UserError(
            f"the exported file could not be opened: {error}; change the model"
        ) from None


def _validate(description: dict[str, Any]) -> dict[str, Any]:
    preprocessing = _preprocessing(description["preprocessing"])
    return {
        "preprocessing": preprocessing,
        "class_names": check_class_names(description["class_names"]),
        "input_shape": _input_shape(description["input_shape"], preprocessing),
    }


def _preprocessing(values: Any) -> Preprocessing:
    if not isinstance(values, dict):
        raise ValueError("preprocessing has no keys")
    for key in ("image_size", "resize"):
        sizes = values.get(key)
        for size in sizes if isinstance(sizes, list) else [sizes]:
            if size is None and key == "resize":
                continue
            if type(size) is not int or not 1 <= size <= MAX_SIDE:
                raise ValueError(f"preprocessing.{key} must lie in 1..{MAX_SIDE} pixels")
    for key in ("mean", "std"):
        numbers = values.get(key)
        if not isinstance(numbers, list) or not all(
            type(number) in (int, float) and math.isfinite(number) for number in numbers
        ):
            raise ValueError(f"preprocessing.{key} must be three numbers")
    if not isinstance(values.get("interpolation"), str):
        raise ValueError("preprocessing.interpolation must be a name")
    return Preprocessing.from_dict(values)


def _input_shape(shape: Any, preprocessing: Preprocessing) -> tuple[int | None, int, int, int]:
    if not isinstance(shape, list) or shape[1:] != [3, *preprocessing.image_size]:
        raise ValueError("input_shape must be [batch, 3, *preprocessing.image_size]")
    batch = shape[0]
    if batch is not None and (
        type(batch) is not int or not 1 <= batch <= _MAX_FLOATS // math.prod(shape[1:])
    ):
        raise ValueError(
            f"input_shape[0] must be null, or 1..{_MAX_FLOATS // math.prod(shape[1:])} images"
        )
    return tuple(shape)
