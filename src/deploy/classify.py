"""Classification of images and of folders of images, as infer.py reports it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from src.data.folders import IMAGE_EXTENSIONS, images_below
from src.deploy.predictor import Predictor
from src.errors import UserError, printable
from src.files import is_json, require_replaceable, write_json
from src.plots.contact_sheet import SHEET_SUFFIXES, Tile, draw_sheet
from src.plots.image_files import is_picture_of_ours
from src.progress import progress_bar

logger = logging.getLogger("cvt")
SHEET_IMAGES = 120  # of a contact sheet; more would be no sheet to look at


def check_outputs(json_file: str | None, sheet: str | None, force: bool = False) -> None:
    """Check that results can be written where they are asked for, before any work.

    Args:
        json_file, sheet: as `classify_files`.
        force: replace also files that are no earlier results.

    Raises:
        UserError: they can't.
    """
    if json_file is not None:
        require_replaceable(json_file, "--json", _is_result, force)
    if sheet is not None:
        if Path(sheet).suffix.lower() not in SHEET_SUFFIXES:
            raise UserError(f"--sheet {sheet}: must end in one of {' '.join(SHEET_SUFFIXES)}")
        require_replaceable(sheet, "--sheet", is_picture_of_ours, force)


def _is_result(path: Path) -> bool:
    return is_json(path, lambda entries: all({"file", "top"} <= set(each) for each in entries))


def classify_files(
    predictor: Predictor,
    places: str | Sequence[str],
    top_k: int,
    json_file: str | None,
    sheet: str | None = None,
    force: bool = False,
) -> None:
    """Print a line per image (path, class, probability); write the candidates where asked to.

    Args:
        predictor: the model.
        places: image files, and folders whose images at any depth are taken in sorted order.
        top_k: candidates an image.
        json_file: where to write them; a file that is no image has none, and an "error".
        sheet: where to write a picture of the first images with their best classes.
        force: replace also files that are no earlier results.

    Raises:
        UserError: nothing to read, or files that are no images; the others were reported by then.
    """
    check_outputs(json_file, sheet, force)
    files = find_images(places)
    entries, tiles, broken = [], [], []
    with progress_bar(len(files), "classify") as bar:
        for file, result in zip(files, predictor.stream(files, top_k)):
            entry, tile = {"file": file, "top": []}, Tile(file)
            if isinstance(result, UserError):
                broken.append(str(result))
                entry["error"] = str(result)
                if len(files) > 1:
                    bar.write(printable(result), file=sys.stderr)
            else:
                best = result[0]
                bar.write(f"{printable(file)}  {printable(best.name)}  {best.probability:.4f}")
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
        draw_sheet(tiles, Path(sheet))
        left_out = len(tiles) < len(files)
        of_all = f", the first {len(tiles)} of {len(files)} images" if left_out else ""
        logger.info("wrote %s%s", sheet, of_all)
    if broken:
        raise UserError(
            broken[0] if len(files) == 1 else f"{len(broken)} of {len(files)} files: {broken[0]}"
        )


def find_images(places: str | Path | Sequence[str | Path]) -> list[str]:
    """Find image files: those named, and those below folders at any depth, each folder's sorted.

    Raises:
        UserError: a place that is not there, or a folder without images.
    """
    if isinstance(places, (str, Path)):
        places = [places]
    found: dict[str, None] = {}  # a file that is named twice is classified once
    for place in map(Path, places):
        if place.is_file():
            found[str(place)] = None
            continue
        if not place.is_dir():
            raise UserError(f"--input {place}: no such file or folder")
        images, others = images_below(place)
        if others:
            logger.warning("%s: left out %d files that are no images", place, len(others))
        if not images:
            raise UserError(f"--input {place}: no images in it ({' '.join(IMAGE_EXTENSIONS)})")
        found.update(dict.fromkeys(images))
    return list(found)
