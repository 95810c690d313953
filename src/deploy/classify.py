"""Classification of an image or of a folder of images, as infer.py reports it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from src.data.sources import IMAGE_EXTENSIONS, images_below
from src.deploy.predictor import Predictor
from src.errors import UserError
from src.reporting.figures import write_json
from src.reporting.progress import progress_bar

logger = logging.getLogger("cvt")


def classify_files(predictor: Predictor, place: str, top_k: int, json_file: str | None) -> None:
    """Print a line per image (path, class, probability); write the candidates as JSON if asked to.

    Args:
        predictor: the model.
        place: an image file, or a folder whose images at any depth are taken in sorted order.
        top_k: candidates an image.
        json_file: where to write them.

    Raises:
        UserError: nothing to read, or files that are no images; the others were reported by then.
    """
    results, broken = [], []
    files = _find(Path(place))
    with progress_bar(len(files), "classify") as bar:
        for start in range(0, len(files), predictor.batch_size):
            names, inputs = [], []
            for file in files[start : start + predictor.batch_size]:
                try:
                    inputs.append(predictor.prepare(file))
                    names.append(file)
                except UserError as error:
                    broken.append(str(error))
            predictions = predictor.classify(np.stack(inputs), top_k) if inputs else []
            for name, ranked in zip(names, predictions):
                bar.write(f"{name}  {ranked[0].name}  {ranked[0].probability:.4f}")
                results.append({"file": name, "top": [each._asdict() for each in ranked]})
            bar.update(len(names))
    if json_file is not None:
        write_json(results, json_file)
    if broken:
        raise UserError(
            broken[0] if len(files) == 1 else f"{len(broken)} of {len(files)} files: {broken[0]}"
        )


def _find(place: Path) -> list[str]:
    if place.is_file():
        return [str(place)]
    if not place.is_dir():
        raise UserError(f"--input {place}: no such file or folder")
    images, others = images_below(place)
    if others:
        logger.warning("%s: left out %d files that are no images", place, len(others))
    if not images:
        raise UserError(f"--input {place}: no images in it ({' '.join(IMAGE_EXTENSIONS)})")
    return images
