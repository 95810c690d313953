"""Classification of an image or of a folder of images, as infer.py reports it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from src.data.folders import IMAGE_EXTENSIONS, images_below
from src.deploy.predictor import Predictor
from src.errors import UserError
from src.files import write_json
from src.reporting.progress import progress_bar
from src.reporting.sheet import SHEET_SUFFIXES, Tile, draw_sheet

logger = logging.getLogger("cvt")
SHEET_IMAGES = 120  # of a contact sheet; more would be no sheet to look at


def classify_files(
    predictor: Predictor,
    place: str,
    top_k: int,
    json_file: str | None,
    sheet: str | None = None,
) -> None:
    """Print a line per image (path, class, probability); write the candidates where asked to.

    Args:
        predictor: the model.
        place: an image file, or a folder whose images at any depth are taken in sorted order.
        top_k: candidates an image.
        json_file: where to write them; a file that is no image has none, and an "error".
        sheet: where to write a picture of the first images with their best classes.

    Raises:
        UserError: nothing to read, or files that are no images; the others were reported by then.
    """
    if sheet is not None and Path(sheet).suffix.lower() not in SHEET_SUFFIXES:
        raise UserError(f"--sheet {sheet}: must end in one of {' '.join(SHEET_SUFFIXES)}")
    entries, tiles, broken = [], [], []
    files = find_images(place)
    with progress_bar(len(files), "classify") as bar:
        for file, result in zip(files, predictor.stream(files, top_k)):
            entry, tile = {"file": file, "top": []}, Tile(file)
            if isinstance(result, UserError):
                broken.append(str(result))
                entry["error"] = str(result)
                if len(files) > 1:
                    bar.write(str(result), file=sys.stderr)
            else:
                best = result[0]
                bar.write(f"{file}  {best.name}  {best.probability:.4f}")
                entry["top"] = [each._asdict() for each in result]
                tile = Tile(file, best.name, best.probability)
            if json_file is not None:
                entries.append(entry)
            if len(tiles) < SHEET_IMAGES:
                tiles.append(tile)
            bar.update()
    if json_file is not None:
        write_json(entries, json_file)
    if sheet is not None:
        _write_sheet(tiles, len(files), sheet)
    if broken:
        raise UserError(
            broken[0] if len(files) == 1 else f"{len(broken)} of {len(files)} files: {broken[0]}"
        )


def _write_sheet(tiles: list[Tile], files: int, sheet: str) -> None:
    try:
        draw_sheet(tiles, Path(sheet))
    except OSError as error:
        raise UserError(f"--sheet {sheet}: {error.strerror}; give another file") from error
    of_all = f", the first {len(tiles)} of {files} images" if len(tiles) < files else ""
    logger.info("wrote %s%s", sheet, of_all)


def find_images(place: str | Path) -> list[str]:
    """An image file itself, or the images below a folder at any depth, sorted.

    Raises:
        UserError: neither, or a folder without images.
    """
    place = Path(place)
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
