"""Photographs of every size and kind, for what must read them all."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = [
    (".jpg", "RGB"), (".jpg", "L"), (".jpg", "CMYK"), (".png", "RGB"), (".png", "RGBA"),
    (".png", "LA"), (".png", "P"), (".bmp", "RGB"), (".bmp", "L"), (".tif", "RGB"),
    (".tif", "RGBA"), (".tif", "L"),
]  # fmt: skip


def make_photographs(folder: Path, count: int, photos: Path | None) -> None:
    """Images 40 to 2,400 pixels wide, of every format and mode, of the photographs or of noise."""
    rng = random.Random(0)
    originals = sorted(photos.rglob("*.jpg")) if photos else []
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        suffix, mode = KINDS[k % len(KINDS)]
        width = round(40 * 60 ** rng.random())
        if originals:
            image = Image.open(rng.choice(originals)).convert("RGB")
        else:
            image = Image.fromarray(noise)
        height = max(1, round(width * image.height / image.width))
        image = image.resize((width, height), Image.BILINEAR).convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(rng.randrange(256))
        options = {"compression": "tiff_lzw"} if suffix == ".tif" else {}
        image.save(folder / f"{k:04}{suffix}", **options)
