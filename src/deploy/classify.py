"""Classify images and folders of images, for infer.py."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from src.data.folders import IMAGE_EXTENSIONS, list_images
from src.deploy.predictor import Predictor
from src.errors import UserError, discard_output, printable
from src.files import is_json, require_different, require_replaceable, write_json
from src.plots.contact_sheet import SHEET_SUFFIXES, Tile, draw_sheet
from src.plots.image_files import check_picture
from src.progress import progress_bar

logger = logging.getLogger("cvt")
MAX_TILES = 120  # of a contact sheet


def check_outputs(
    json_file: str | None, sheet: str | None, attention: str | None = None, force: bool = False
) -> None:
    """Check that the output files can be written, before the model is loaded.

    Args:
        json_file, sheet: as in `classify_files`.
        attention: file for an attention map; only compared with the others.
        force: replace any existing file, instead of earlier results only.

    Raises:
        UserError: a file can't be written or replaced, or two are the same.
    """
    require_different({"--json": json_file, "--sheet": sheet, "--attention": attention})
    if json_file is not None:
        require_replaceable(json_file, "--json", _is_result, force)
    if sheet is not None:
        check_picture(sheet, "--sheet", SHEET_SUFFIXES, force)


def _is_result(path: Path) -> bool:
    return is_json(path, lambda entries: all({"file", "top"} <= set(each) for each in entries))


def classify_files(
    predictor: Predictor,
    inputs: str | Sequence[str],
    top_k: int,
    json_file: str | None,
    sheet: str | None = None,
) -> None:
    """Print path, class and probability of each image, and write the results that are asked for.

    Args:
        predictor: the model.
        inputs: image files and folders; see `find_images`.
        top_k: candidates per image.
        json_file: file for all candidates. An unreadable file has none, and an "error".
        sheet: file for a picture of the first images with their best classes.

    Raises:
        UserError: there are no images, or some can't be read. All others are classified first.
    """
    files = find_images(inputs, leave_out=sheet)
    entries, tiles, broken = [], [], []

    def show(line: str, stream: TextIO) -> None:
        try:
            bar.write(line, file=stream)
            stream.flush()  # not at exit, where a closed pipe is an error
        except BrokenPipeError:  # as of `| head`
            if json_file is None and sheet is None:
                raise
            discard_output()  # the files are still wanted
        except OSError:  # a full disk; if it stays full, the program ends with this error
            if json_file is None and sheet is None:
                raise

    with progress_bar(len(files), "classify") as bar:
        for file, result in zip(files, predictor.stream(files, top_k)):
            entry, tile = {"file": file, "top": []}, Tile(file)
            if isinstance(result, UserError):
                broken.append(str(result))
                entry["error"] = str(result)
                if len(files) > 1:
                    show(printable(result), sys.stderr)
            else:
                best = result[0]
                line = f"{printable(file)}  {printable(best.name)}  {best.probability:.4f}"
                show(line, sys.stdout)
                entry["top"] = [each._asdict() for each in result]
                tile = Tile(file, best.name, best.probability)
            if json_file is not None:
                entries.append(entry)
            if len(tiles) < MAX_TILES:
                tiles.append(tile)
            bar.update()
    if json_file is not None:
        write_json(entries, json_file)
    if sheet is not None:
        draw_sheet(tiles, Path(sheet))
        partial = f", the first {len(tiles)} of {len(files)} images" * (len(tiles) < len(files))
        logger.info("wrote %s%s", sheet, partial)
    if broken:
        raise UserError(
            broken[0] if len(files) == 1 else f"{len(broken)} of {len(files)} files: {broken[0]}"
        )


def find_images(
    inputs: str | Path | Sequence[str | Path], leave_out: str | None = None
) -> list[str]:
    """Find image files: the given ones, and those in folders at any depth, sorted by folder.

    Args:
        inputs: files and folders.
        leave_out: a picture that this command writes, maybe into such a folder.

    Raises:
        UserError: an input does not exist, or a folder has no images.
    """
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    found: dict[str, None] = {}  # in order, each file once
    for path in map(Path, inputs):
        if path.is_file():
            found[str(path)] = None
            continue
        if not path.is_dir():
            what = "no such file or folder"
            if path.exists():
                what = "is a pipe or a device; give an image file or a folder"
            raise UserError(f"--input {path}: {what}")
        images, others = list_images(path)
        if leave_out is not None:
            own = os.path.realpath(leave_out)
            images = [image for image in images if os.path.realpath(image) != own]
        if others:
            logger.warning(
                "%s: left out files (%d) that are not %s, such as %s",
                path, len(others), " ".join(IMAGE_EXTENSIONS), others[0],
            )  # fmt: skip
        if not images:
            raise UserError(f"--input {path}: no images in it ({' '.join(IMAGE_EXTENSIONS)})")
        found.update(dict.fromkeys(images))
    return list(found)
