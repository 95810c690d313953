"""Write held-out digits as image files for examples."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from src.data.sources import open_source


def write_samples(folder: str | Path) -> list[Path]:
    """Write the first held-out digit of each class as PNG; the name ends with the true class."""
    source, folder = open_source("digits", None, "val"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for label, name in enumerate(source.class_names):
        image, _ = source[int((source.labels == label).argmax())]
        paths.append(folder / f"digit_{name}.png")
        Image.fromarray(image).save(paths[-1])
    return paths
